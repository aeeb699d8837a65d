-- ARGV: runs, name, count, digest. Notes that the input has ended, unless the run holds more of it than this.
local meta = redis.call('HMGET', run, 'state', 'count', 'digest', 'produced')
if meta[1] ~= 'running' or meta[4] == '1' or meta[2] ~= ARGV[3] or meta[3] ~= ARGV[4] then
    return {0, meta[1], meta[2], meta[3], meta[4]}
end
redis.call('HSET', run, 'produced', 1)
finish_if_complete(ARGV[1], ARGV[2])
return {1, meta[1], meta[2], meta[3], '1'}
