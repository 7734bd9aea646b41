-- Admits an order or says what is sold out: validates every line, then deducts every line.
-- KEYS: stock, pending. ARGV: reservation, now (ms), lease (ms), then SKU, units, SKU, units, …
-- Returns {1, ''} admitted, {0, sku} sold out, {-1, ''} not loaded.
local stock, pending = KEYS[1], KEYS[2]
local id, now, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

-- Reservations whose process died before it settled them give their units back.
local due = redis.call('ZRANGEBYSCORE', pending, '-inf', now, 'LIMIT', 0, 100)
for _, old in ipairs(due) do
    local held = redis.call('HGETALL', pending .. ':' .. old)
    for at = 1, #held, 2 do
        redis.call('HINCRBY', stock, held[at], held[at + 1])
    end
    redis.call('DEL', pending .. ':' .. old)
    redis.call('ZREM', pending, old)
end

local held = pending .. ':' .. id
if redis.call('EXISTS', held) == 1 then
    return {1, ''}
end
for at = 4, #ARGV, 2 do
    local left = redis.call('HGET', stock, ARGV[at])
    if not left then
        return {-1, ''}
    end
    if tonumber(left) < tonumber(ARGV[at + 1]) then
        return {0, ARGV[at]}
    end
end
for at = 4, #ARGV, 2 do
    redis.call('HINCRBY', stock, ARGV[at], -tonumber(ARGV[at + 1]))
    redis.call('HSET', held, ARGV[at], ARGV[at + 1])
end
redis.call('ZADD', pending, now + lease, id)
return {1, ''}
