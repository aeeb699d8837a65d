-- KEYS[1]: the limit. ARGV: seconds. Holds all workers for that long, or for longer if they are held already.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('DEL', KEYS[1] .. ':none')
local paused = redis.pcall('GET', KEYS[1] .. ':pause')
paused = type(paused) == 'string' and tonumber(paused) or 0
if paused ~= paused then -- not a number
    paused = 0
end
local wanted = now + ARGV[1] * 1000000
if wanted > paused or paused > now + ARGV[2] * 1000000 then
    redis.call('SET', KEYS[1] .. ':pause', string.format('%.0f', wanted), 'PX', math.ceil(ARGV[1] * 1000) + 1000)
end
return 1
