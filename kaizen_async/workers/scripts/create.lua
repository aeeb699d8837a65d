-- ARGV: runs, name, options, keep, id of a new run, digest of no ids. Creates the run unless there is one of this name.
-- Returns the options and the id of the run that there is now.
if redis.call('EXISTS', run) == 1 then
    return redis.call('HMGET', run, 'options', 'id')
end
redis.call('HSET', run, 'id', ARGV[5], 'state', 'running', 'options', ARGV[3], 'count', 0, 'digest', ARGV[6], 'produced', 0, 'shards', 0,
    'done', 0, 'failed', 0, 'invalid', 0, 'set_aside', 0, 'read', 0, 'unread_bytes', 0, 'acked', '0-0',
    'created_at', clock())
redis.call('SADD', ARGV[1], ARGV[2])
keep(ARGV[4])
return {ARGV[3], ARGV[5]}
