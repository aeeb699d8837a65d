-- Prepended to every script of a run. KEYS[1] is the run's key; the others are derived from it and share its hash slot.
-- The last of ARGV is the id of the run, or '' for any run of this name. If the run of that id was purged, the script
-- sees a key that never exists, whatever run has the name now.
local run = KEYS[1]
local id = table.remove(ARGV)
if id ~= '' and redis.call('HGET', run, 'id') ~= id then
    run = run .. ':none'
end
local key = {
    todo = run .. ':todo', later = run .. ':later', ids = run .. ':ids', state = run .. ':state',
    held = run .. ':held', waits = run .. ':waits', out = run .. ':out', failed = run .. ':failed',
    members = run .. ':members',
}

-- Milliseconds by the clock of Redis: the clocks of the machines never matter.
local function clock()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- A full Redis refuses scripts whose first write needs memory. What follows a harmless first write passes, so
-- heartbeats and acknowledgements, which lead out of that state, still work.
local function although_full()
    redis.call('DEL', run .. ':none')
end

local function number(field)
    return tonumber(redis.call('HGET', run, field) or '0')
end

local function keep(milliseconds)
    redis.call('PEXPIRE', run, milliseconds)
    for _, name in pairs(key) do
        redis.call('PEXPIRE', name, milliseconds)
    end
end

-- Keys that came up since then expire together with the run.
local function keep_together()
    keep(math.max(redis.call('PTTL', run), 1000))
end

local function finish_if_complete(runs, name)
    local meta = redis.call('HMGET', run, 'produced', 'count', 'done')
    if meta[1] == '1' and meta[2] == meta[3] then
        redis.call('HSET', run, 'state', 'finished', 'finished_at', clock())
        redis.call('SREM', runs, name)
    end
end

local function add_shard(ids, size)
    local shard = redis.call('HINCRBY', run, 'shards', 1)
    redis.call('HSET', key.ids, shard, ids)
    redis.call('HSET', key.state, shard, cmsgpack.pack({
        size = size, done = 0, marked = 0, token = '', seq = 0, tries = 0, first = 0, claimed = 0, bits = '', why = '',
    }))
    redis.call('RPUSH', key.todo, shard)
    return shard
end

-- Takes a shard from its owner, so that the next worker that asks gets it.
local function give_back(shard, push)
    redis.call('HDEL', key.held, shard)
    redis.call(push, key.todo, shard)
end
