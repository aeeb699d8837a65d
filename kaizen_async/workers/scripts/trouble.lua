-- ARGV: why. Notes for the reader why a worker cannot work on the run.
although_full()
if redis.call('EXISTS', run) == 1 then
    redis.call('HSET', run, 'trouble', ARGV[1])
end
return 1
