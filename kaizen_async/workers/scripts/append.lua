-- ARGV: keep, ids counted before, ids in this part, digest after it, ids of the shard, their number,
-- outcomes of invalid ids, their number. Appends the part, unless a producer has appended it already.
local meta = redis.call('HMGET', run, 'state', 'count', 'digest', 'produced')
if meta[1] ~= 'running' or meta[4] == '1' or meta[2] ~= ARGV[2] then
    return {0, meta[1], meta[2], meta[3], meta[4]}
end
if tonumber(ARGV[6]) > 0 then
    add_shard(ARGV[5], tonumber(ARGV[6]))
end
local invalid = tonumber(ARGV[8])
if invalid > 0 then
    redis.call('XADD', key.out, '*', 'n', invalid, 'b', ARGV[7])
    for _, field in ipairs({'done', 'failed', 'invalid'}) do
        redis.call('HINCRBY', run, field, invalid)
    end
    redis.call('HINCRBY', run, 'unread_bytes', #ARGV[7])
end
redis.call('HSET', run, 'count', ARGV[2] + ARGV[3], 'digest', ARGV[4])
keep(ARGV[1])
return {1, meta[1], ARGV[2] + ARGV[3], ARGV[4], meta[4]}
