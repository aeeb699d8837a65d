-- KEYS[1]: durations of executions that workers saw end. ARGV: worker, its latest durations ('' for none), entries kept,
-- keep, the last entry that it knows. Adds what this worker saw; returns what all saw since that entry.
if ARGV[2] ~= '' then
    redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[3], '*', 'w', ARGV[1], 'd', ARGV[2])
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return redis.call('XRANGE', KEYS[1], '(' .. ARGV[5], '+', 'COUNT', 50)
