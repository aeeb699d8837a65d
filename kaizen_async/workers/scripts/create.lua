-- ARGV: runs, name, options, keep. Returns whether the run was created; KEYS[1] holds it in either case.
if redis.call('EXISTS', run) == 1 then
    return 0
end
redis.call('HSET', run, 'state', 'running', 'options', ARGV[3], 'count', 0, 'digest', '', 'produced', 0, 'shards', 0,
    'done', 0, 'failed', 0, 'invalid', 0, 'set_aside', 0, 'read', 0, 'unread_bytes', 0, 'acked', '0-0',
    'created_at', clock())
redis.call('SADD', ARGV[1], ARGV[2])
keep(ARGV[4])
return 1
