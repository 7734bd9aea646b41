-- Ends a reservation. KEYS: stock, pending. ARGV: reservation, 1 to give the units back.
local stock, pending = KEYS[1], KEYS[2]
local held = pending .. ':' .. ARGV[1]
if ARGV[2] == '1' then
    local units = redis.call('HGETALL', held)
    for at = 1, #units, 2 do
        redis.call('HINCRBY', stock, units[at], units[at + 1])
    end
end
redis.call('DEL', held)
return redis.call('ZREM', pending, ARGV[1])
