-- ARGV: runs, name. Deletes all of a run, and returns whether there was one. Its workers and readers find it gone, even
-- if another run takes its name at once.
although_full()
local existed = redis.call('UNLINK', run)
for _, name in pairs(key) do
    redis.call('UNLINK', name)
end
redis.call('UNLINK', run .. ':invited')
redis.call('SREM', ARGV[1], ARGV[2])
return existed
