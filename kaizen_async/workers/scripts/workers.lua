-- KEYS[1]: the workers. ARGV: prefix of runs, set of runs, worker ('' for a producer or reader), ms until dead.
-- Notes that a worker lives. Returns the number of live workers, and run, number pairs: how many invitations to
-- that run are to be sent now, because so many live workers do not work on it.
redis.call('DEL', KEYS[1] .. ':none')
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[3] ~= '' then
    redis.call('ZADD', KEYS[1], now, ARGV[3])
    redis.call('PEXPIRE', KEYS[1], 86400000)
end
-- Kept for longer than most outages of Redis, so that workers are known after them.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - 600000)
local live = redis.call('ZCOUNT', KEYS[1], now - ARGV[4], '+inf')
local reply = {live}
for _, name in ipairs(redis.call('SMEMBERS', ARGV[2])) do
    local run = ARGV[1] .. name
    -- What is not as this package writes it concerns that run only.
    local state = redis.pcall('HGET', run, 'state')
    local members = redis.pcall('ZCOUNT', run .. ':members', now - ARGV[4], '+inf')
    if state ~= 'running' or type(members) ~= 'number' then
        redis.call('SREM', ARGV[2], name)
    else
        local missing = math.max(live, 1) - members
        local times = tonumber(redis.call('HGET', run, 'invites') or '0') or 0
        local before = tonumber(redis.call('HGET', run, 'members') or '0') or 0
        if members ~= before or times ~= times then
            times = 0
            redis.call('HSET', run, 'members', members)
        end
        if members < before then -- a worker has left or died: others are invited at once
            redis.call('DEL', run .. ':invited')
        end
        if missing > 0 and redis.call('EXISTS', run .. ':invited') == 0 then
            -- Workers that are busy leave invitations in the queue, so repeated ones become rare.
            redis.call('HSET', run, 'invites', times + 1)
            redis.call('SET', run .. ':invited', '1', 'PX', 2000 * 2 ^ math.min(math.max(times, 0), 5))
            table.insert(reply, name)
            table.insert(reply, math.min(missing, 64))
        end
    end
end
return reply
