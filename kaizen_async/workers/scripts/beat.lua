-- ARGV: workers, worker, ms until a silent worker counts as dead, ms after its claim in which a crash is the shard's
-- fault, then the shards that the worker holds. Takes back what this worker does not know it holds (the reply to its
-- claim was lost), and what dead workers hold. Returns the state of the run.
although_full()
local now, dead = clock(), tonumber(ARGV[3])
local meta = redis.call('HMGET', run, 'state', 'watched', 'watching_since')
if not meta[1] then
    return 'unknown'
end
redis.call('ZADD', key.members, now, ARGV[2])
-- After a pause in which nobody reached Redis, silence proves nothing: every worker gets time to report again.
local since = tonumber(meta[3] or now)
if now - tonumber(meta[2] or '0') > dead / 2 then
    since = now
end
redis.call('HSET', run, 'watched', now, 'watching_since', since)
local mine = {}
for at = 5, #ARGV do
    mine[ARGV[at]] = true
end
local held = redis.call('HGETALL', key.held)
for at = 1, #held, 2 do
    local shard, owner = held[at], held[at + 1]
    if owner == ARGV[2] then
        if not mine[shard] then
            give_back(shard, 'LPUSH')
        end
    elseif now - since > dead and now - tonumber(redis.call('ZSCORE', ARGV[1], owner) or '0') > dead then
        local state = cmsgpack.unpack(redis.call('HGET', key.state, shard))
        if state.done == state.marked and now - state.claimed < dead + tonumber(ARGV[4]) then
            state.tries = state.tries + 1
            state.why = 'the worker that had it vanished'
            redis.call('HSET', key.state, shard, cmsgpack.pack(state))
        end
        give_back(shard, 'LPUSH')
    end
end
redis.call('ZREMRANGEBYSCORE', key.members, '-inf', now - dead)
keep_together()
return meta[1]
