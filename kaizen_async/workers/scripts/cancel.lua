-- ARGV: runs, name. Drops what is not looked up yet; what is recorded stays for its reader.
although_full()
local state = redis.call('HGET', run, 'state')
if state == 'running' then
    redis.call('HSET', run, 'state', 'cancelled', 'finished_at', clock())
    redis.call('SREM', ARGV[1], ARGV[2])
    redis.call('UNLINK', key.todo, key.later, key.ids, key.state, key.held, key.waits)
end
return state or 'unknown'
