-- ARGV: keep, reader, ms of its lease, last acknowledged entry before, last acknowledged entry now, outcomes, bytes.
-- Returns 0 if another reader has the lease, else 1; then the state, and the counts that tell the progress.
although_full()
local now = clock()
local meta = redis.call('HMGET', run, 'state', 'reader', 'reader_until', 'acked')
if not meta[1] then
    return {1, 'unknown', '0-0'}
end
local mine = not meta[2] or meta[2] == ARGV[2] or now > tonumber(meta[3])
if mine then
    redis.call('HSET', run, 'reader', ARGV[2], 'reader_until', now + ARGV[3])
    if ARGV[5] ~= ARGV[4] and meta[4] == ARGV[4] then
        redis.call('XTRIM', key.out, 'MINID', ARGV[5])
        redis.call('XDEL', key.out, ARGV[5])
        redis.call('HSET', run, 'acked', ARGV[5])
        redis.call('HINCRBY', run, 'read', ARGV[6])
        redis.call('HINCRBY', run, 'unread_bytes', 0 - ARGV[7])
    end
    keep(ARGV[1])
end
return {mine and 1 or 0, meta[1], redis.call('HGET', run, 'acked')}
