-- Gives a lock back, if it is still ours: after it ran out, a successor may hold it.
if redis.call('GET', KEYS[1]) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0
