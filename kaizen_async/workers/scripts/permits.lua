-- Leases permits of a rate that all workers share: a virtual schedule with one permit every 1/rate seconds (GCRA).
-- KEYS[1]: the limit; its pause is beside it. ARGV: permits a second (0: any number), permits wanted, permits returned,
-- seconds ahead that may be leased, seconds of unused permits that may be caught up, most seconds of a pause.
-- Returns the microseconds of a pause; permits; microseconds until the first of them; microseconds between them.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('DEL', KEYS[1] .. ':none')
local function stored(key)
    local value = redis.pcall('GET', key)
    if type(value) == 'table' then -- of another type: no worker wrote that
        redis.call('DEL', key)
        return 0
    end
    local number = tonumber(value or '0') or 0
    return number == number and number or 0
end

local paused = stored(KEYS[1] .. ':pause')
local pause = math.min(math.max(paused - now, 0), ARGV[6] * 1000000)
if now + pause < paused then -- no worker asked for that: it ends after the longest pause
    redis.call('SET', KEYS[1] .. ':pause', string.format('%.0f', now + pause), 'PX', math.ceil(pause / 1000))
end
local rate, wanted, returned = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if rate == 0 then
    return {pause, wanted, 0, 0}
end
local interval, ahead = 1000000 / rate, ARGV[4] * 1000000
local free = stored(KEYS[1])
-- No honest schedule is further ahead: what is in Redis is input, too.
free = math.min(free, now + ahead + interval) - returned * interval
free = math.max(free, now - ARGV[5] * 1000000)
local permits, wait = 0, math.max(free - now, 0)
if pause == 0 and wait <= ahead then
    permits = math.min(wanted, math.floor((now + ahead - free) / interval) + 1)
end
redis.call('SET', KEYS[1], string.format('%.0f', free + permits * interval), 'PX', 3600000)
return {pause, permits, permits > 0 and wait or math.max(wait - ahead, 0), math.floor(interval)}
