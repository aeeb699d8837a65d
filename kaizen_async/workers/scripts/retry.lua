-- ARGV: runs, name, most parts. Makes shards of failed ids again; returns how many ids, and whether there are more.
local state = redis.call('HGET', run, 'state')
if state ~= 'running' and state ~= 'finished' then
    return {0, 0, state or 'unknown'}
end
local ids = 0
for _ = 1, ARGV[3] do
    local part = redis.call('LINDEX', key.failed, 0)
    if not part then
        break
    end
    local colon = string.find(part, ':', 1, true)
    local size = tonumber(string.sub(part, 1, colon - 1))
    add_shard(string.sub(part, colon + 1), size)
    redis.call('LPOP', key.failed)
    ids = ids + size
end
if ids > 0 then
    keep_together()
    redis.call('HINCRBY', run, 'done', -ids)
    redis.call('HINCRBY', run, 'failed', -ids)
    redis.call('HSET', run, 'state', 'running')
    redis.call('DEL', run .. ':invited') -- workers have left the run, so they are invited again at once
    redis.call('SADD', ARGV[1], ARGV[2])
end
return {ids, redis.call('LLEN', key.failed), state}
