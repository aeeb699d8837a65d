-- ARGV: for each shard: number, token of its claim, what (keep, back, failed), delay in ms, checkpoint ('' for none), why.
-- keep: save the checkpoint. back: another worker continues at once. failed: another tries it after the delay.
although_full()
if redis.call('EXISTS', run) == 0 then
    return 0
end
for at = 1, #ARGV, 6 do
    local shard, token, what = ARGV[at], ARGV[at + 1], ARGV[at + 2]
    local packed = redis.call('HGET', key.state, shard)
    local state = packed and cmsgpack.unpack(packed)
    if state and state.token == token and redis.call('HGET', key.held, shard) then
        if ARGV[at + 4] ~= '' then
            redis.call('HSET', key.waits, shard, ARGV[at + 4])
            state.saved = clock()
            redis.call('HSET', key.state, shard, cmsgpack.pack(state))
        end
        if what == 'back' then
            give_back(shard, 'LPUSH')
        elseif what == 'failed' then
            state.tries = state.done > state.marked and 1 or state.tries + 1
            state.why = ARGV[at + 5]
            redis.call('HSET', key.state, shard, cmsgpack.pack(state))
            redis.call('HDEL', key.held, shard)
            redis.call('HDEL', key.waits, shard)
            redis.call('ZADD', key.later, clock() + ARGV[at + 3], shard)
        end
    end
end
keep_together()
return 1
