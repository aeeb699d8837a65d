-- ARGV: runs, name, then for each shard: number, token of its claim, sequence, outcomes, failed ones, set aside (0 or 1),
-- bits of what is done now, the outcomes, the failed ids as a shard of their own ('' for none).
-- Returns 1 for each shard whose outcomes are recorded, 0 for one that is this worker's no more.
local replies, done, failed, bytes, set_aside = {}, 0, 0, 0, 0
for at = 3, #ARGV, 9 do
    local shard, token, seq = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
    local packed = redis.call('HGET', key.state, shard)
    local state = packed and cmsgpack.unpack(packed)
    if not state or state.token ~= token or not redis.call('HGET', key.held, shard) then
        table.insert(replies, 0)
    else
        if seq > state.seq then -- else it is the same once more: the reply to the first was lost
            local outcomes, failures = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
            redis.call('XADD', key.out, '*', 'n', outcomes, 'b', ARGV[at + 7])
            state.seq, state.bits, state.done = seq, ARGV[at + 6], state.done + outcomes
            done, failed, bytes = done + outcomes, failed + failures, bytes + #ARGV[at + 7]
            set_aside = set_aside + tonumber(ARGV[at + 5])
            if failures > 0 then
                redis.call('RPUSH', key.failed, failures .. ':' .. ARGV[at + 8])
            end
            if state.done == state.size then
                for _, name in ipairs({key.state, key.ids, key.held, key.waits}) do
                    redis.call('HDEL', name, shard)
                end
            else
                redis.call('HSET', key.state, shard, cmsgpack.pack(state))
            end
        end
        table.insert(replies, 1)
    end
end
if done > 0 then
    redis.call('HINCRBY', run, 'done', done)
    redis.call('HINCRBY', run, 'failed', failed)
    redis.call('HINCRBY', run, 'unread_bytes', bytes)
    redis.call('HINCRBY', run, 'set_aside', set_aside)
    redis.call('HSET', run, 'recorded_at', clock())
    finish_if_complete(ARGV[1], ARGV[2])
    keep_together()
end
return replies
