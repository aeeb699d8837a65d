-- ARGV: keep, worker, shards wanted, shards held, limit of unread bytes (0: 200 for each id, at least 64 MB),
-- token of this claim, which no other claim has: outcomes of an earlier one are refused.
-- No worker takes more than its share of what is not finished, so that one that comes later finds work too.
-- Returns the run's state and the shards that are now this worker's: number, size, tries,
-- milliseconds since it was first claimed and since its checkpoint was saved, bits of what is done, ids, checkpoint, why
-- it failed.
although_full()
local meta = redis.call('HMGET', run, 'state', 'unread_bytes', 'count')
if meta[1] ~= 'running' then
    return {meta[1] or 'unknown'}
end
local limit = tonumber(ARGV[5])
if limit == 0 then
    limit = math.max(200 * tonumber(meta[3]), 67108864)
end
if tonumber(meta[2]) > limit then
    return {'unread'}
end
local now = clock()
for _, shard in ipairs(redis.call('ZRANGEBYSCORE', key.later, '-inf', now, 'LIMIT', 0, 100)) do
    redis.call('ZREM', key.later, shard)
    redis.call('RPUSH', key.todo, shard)
end
local open = redis.call('LLEN', key.todo) + redis.call('ZCARD', key.later) + redis.call('HLEN', key.held)
local share = math.ceil(open / math.max(redis.call('ZCARD', key.members), 1))
local most = math.min(tonumber(ARGV[3]), math.max(share - ARGV[4], 0))
local claimed = {'running'}
while #claimed <= most do
    local shard = redis.call('LPOP', key.todo)
    if not shard then
        break
    end
    local packed = redis.call('HGET', key.state, shard)
    if packed then
        local state = cmsgpack.unpack(packed)
        state.token, state.seq, state.claimed = ARGV[6], 0, now
        if state.first == 0 then
            state.first = now
        end
        state.marked = state.done
        redis.call('HSET', key.state, shard, cmsgpack.pack(state))
        redis.call('HSET', key.held, shard, ARGV[2])
        table.insert(claimed, {
            tonumber(shard), state.size, state.tries, now - state.first, now - (state.saved or now),
            state.bits,
            redis.call('HGET', key.ids, shard), redis.call('HGET', key.waits, shard) or '', state.why,
        })
    end
end
if #claimed > 1 then
    redis.call('HDEL', run, 'trouble')
end
keep(ARGV[1])
return claimed
