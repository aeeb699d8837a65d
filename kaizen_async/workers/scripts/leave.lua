-- ARGV: worker. Takes a worker off the list of those that work on the run.
redis.call('ZREM', key.members, ARGV[1])
return 1
