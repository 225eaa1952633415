"""The scripts of the queue: each is one step that happens whole or not at all, whatever dies beside it. Pure.

All keys have the hash tag `{jobs}`, so that a script may name several in a cluster too:

| key                | type   | holds                                                                                  |
| ------------------ | ------ | -------------------------------------------------------------------------------------- |
| `...q{jobs}stream` | stream | jobs that wait or are worked on, field `job`; those done are deleted; one group         |
| `...q{jobs}wait`   | hash   | a job's key -> its id in the stream, while nobody has taken it; may be lost, or left    |
| `...q{jobs}due`    | zset   | jobs that failed and are tried again, by the server's clock in ms                       |
| `...q{jobs}dead`   | stream | jobs that nobody tries any more, field `job`                                            |
| `...q{jobs}count`  | hash   | outcome -> how many                                                                     |
| `...q{jobs}gone`   | hash   | an image's digest and name -> when the registry first said that it has none, in s       |
| `...q{jobs}turn:N` | string | whose turn N is; expires                                                                |
| `...l{NAME}`       | string | who has the lease NAME: a random text; expires                                          |

The servers keep the time. Redis 6.2 or later (XAUTOCLAIM), or any Valkey.
"""

from __future__ import annotations

GROUP = "indexers"
DEAD_MAX = 10_000  # jobs given up that are remembered

_NOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""
# Whether worker ARGV[2] has entry ARGV[3]. Ends the script with 0 otherwise.
_MINE = """
local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if held['err'] or #held == 0 or held[1][2] ~= ARGV[2] then return 0 end
"""
_DROP = """
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
"""
# The key of a job, false for what is none: anybody who asks may have put anything there.
_KEY_OF = """
local function key_of(job)
  local parsed, value = pcall(cjson.decode, job)
  local key = parsed and type(value) == 'table' and value['key']
  return type(key) == 'string' and key
end
"""
# Adds a job unless one of its key waits. A server may lose either of the two keys alone, and a stream that begins anew gives ids
# once more: `wait` is believed while the stream has that job.
_ADD = f"""
{_KEY_OF}
local function add(key, job)
  local at = redis.call('HGET', KEYS[2], key)
  if at and string.find(at, '^%d+%-%d+$') then
    local found = redis.call('XRANGE', KEYS[1], at, at)[1]
    if found and key_of(found[2][2]) == key then return 0 end
  end
  redis.call('HSET', KEYS[2], key, redis.call('XADD', KEYS[1], '*', 'job', job))
  return 1
end
"""

# KEYS: stream, wait. ARGV: a job's key, the job, and so on. How many are new.
PUT = f"""
{_ADD}
local new = 0
for at = 1, #ARGV, 2 do new = new + add(ARGV[at], ARGV[at + 1]) end
return new
"""
# KEYS: stream, wait, due. ARGV: group, worker, ms after which a silent worker's job is another's.
TAKE = f"""
{_NOW}
{_ADD}
for _, job in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[3], job)
  local key = key_of(job)
  if key then add(key, job) else redis.call('XADD', KEYS[1], '*', 'job', job) end  -- who takes what is no job gives it up
end
local entry, from = nil, '0-0'
repeat
  local found = redis.pcall('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], from, 'COUNT', 1)
  if found['err'] then
    if not string.find(found['err'], 'NOGROUP') then return found end
    redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
    break
  end
  from, entry = found[1], found[2][1]
until entry or from == '0-0'
if not entry then
  local found = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
  if not found then
    redis.call('DEL', KEYS[2])  -- nothing waits: what it still names was lost
    redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[2])  -- who has nothing to do is listed, too
    return false
  end
  entry = found[1][2][1]
end
local id, job = entry[1], entry[2] and entry[2][2]
if not job then
  redis.call('XACK', KEYS[1], ARGV[1], id)
  return false
end
local key = key_of(job)
if key and redis.call('HGET', KEYS[2], key) == id then redis.call('HDEL', KEYS[2], key) end
return {{id, job, redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1][4]}}
"""
# KEYS: stream. ARGV: group, worker, id.
RENEW = f"""
{_MINE}
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
return 1
"""
# KEYS: stream, count. ARGV: group, worker, id, outcome.
FINISH = f"""
{_MINE}
{_DROP}
redis.call('HINCRBY', KEYS[2], ARGV[4], 1)
return 1
"""
# KEYS: stream, due, count. ARGV: group, worker, id, the job as it is tried again, in how many ms.
RETRY = f"""
{_MINE}
{_DROP}
{_NOW}
redis.call('ZADD', KEYS[2], now + ARGV[5], ARGV[4])
redis.call('HINCRBY', KEYS[3], 'retried', 1)
return 1
"""
# KEYS: stream. ARGV: group, worker, id, the job.
GIVE_BACK = f"""
{_MINE}
{_DROP}
redis.call('XADD', KEYS[1], '*', 'job', ARGV[4])
return 1
"""
# KEYS: stream, dead, count. ARGV: group, worker, id, the job, how many are remembered.
BURY = f"""
{_MINE}
{_DROP}
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'job', ARGV[4])
redis.call('HINCRBY', KEYS[3], 'failed', 1)
return 1
"""
# KEYS: stream, wait, dead. ARGV: id in dead, the job's key, the job.
REVIVE = f"""
{_ADD}
if redis.call('XDEL', KEYS[3], ARGV[1]) == 0 then return 0 end
add(ARGV[2], ARGV[3])
return 1
"""
# KEYS: stream. ARGV: group, how many. The first jobs that nobody has taken, in order.
WAITING = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
local after, found = '-', {}
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local one = {}
  for at = 1, #flat, 2 do one[flat[at]] = flat[at + 1] end
  if one['name'] == ARGV[1] then after = '(' .. one['last-delivered-id'] end
end
for at, entry in ipairs(redis.call('XRANGE', KEYS[1], after, '+', 'COUNT', ARGV[2])) do found[at] = entry[2][2] end
return found
"""
# KEYS: stream. ARGV: group, worker, ms. The worker, and others that have been silent for so long, unless they hold a job.
LEAVE = """
local found = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if found['err'] then return 0 end
for _, flat in ipairs(found) do
  local one = {}
  for at = 1, #flat, 2 do one[flat[at]] = flat[at + 1] end
  if one['pending'] == 0 and (one['name'] == ARGV[2] or one['idle'] > tonumber(ARGV[3])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], one['name'])
  end
end
return 1
"""
# KEYS: a lease. ARGV: its holder, ms.
EXTEND = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
# KEYS: a lease. ARGV: its holder.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
