-- ARGV: ms until a silent worker counts as dead. Returns how many live workers work on the run.
return redis.call('ZCOUNT', key.members, clock() - ARGV[1], '+inf')
