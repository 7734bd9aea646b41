//! Rate limits that several gateways share: the same algorithm as [`super::limit`], run by Redis
//! in one script, by Redis's clock.

use std::time::Duration;

use redis::{
    Client, RedisError, Script,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use tokio::sync::OnceCell;

use super::limit::{Cell, Verdict};
use crate::config::RateStore;

/// KEYS: the cell. ARGV: interval and tolerance in microseconds. Returns whether it passes, how
/// many more would, and the wait in microseconds. Numbers below 2^53 are exact in Lua.
const SCRIPT: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, tolerance = tonumber(ARGV[1]), tonumber(ARGV[2])
local arrival = tonumber(redis.call('GET', KEYS[1]) or '0')
local next = math.max(arrival, now) + interval
local ahead = next - now
if ahead > tolerance then
  return {0, 0, ahead - tolerance}
end
redis.call('SET', KEYS[1], string.format('%.0f', next), 'PX', math.floor(ahead / 1000) + 1)
return {1, math.floor((tolerance - ahead) / interval), ahead}
";

/// The store of a configuration.
pub struct Store {
    config: RateStore,
    script: Script,
    manager: OnceCell<ConnectionManager>,
}

impl Store {
    /// Connects when it is first asked.
    #[must_use]
    pub fn new(config: RateStore) -> Self {
        Self {
            config,
            script: Script::new(SCRIPT),
            manager: OnceCell::new(),
        }
    }

    /// What it is configured to be.
    #[must_use]
    pub fn config(&self) -> &RateStore {
        &self.config
    }

    /// Counts a request, if it may pass.
    ///
    /// # Errors
    /// The store did not answer in time.
    pub async fn check(&self, cell: Cell, key: &str) -> Result<Verdict, String> {
        let asked = async {
            let mut manager = self.manager().await?.clone();
            let micros = |nanos: u64| nanos.div_ceil(1000).max(1);
            let mut call = self.script.prepare_invoke();
            call.key(key)
                .arg(micros(cell.interval))
                .arg(micros(cell.tolerance));
            call.invoke_async::<(u8, u64, u64)>(&mut manager).await
        };
        let (allowed, remaining, wait) = tokio::time::timeout(self.config.timeout, asked)
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|error: RedisError| error.to_string())?;
        Ok(Verdict {
            allowed: allowed == 1,
            remaining,
            wait: Duration::from_micros(wait),
        })
    }

    async fn manager(&self) -> Result<&ConnectionManager, RedisError> {
        self.manager
            .get_or_try_init(|| async {
                let config = ConnectionManagerConfig::new()
                    .set_number_of_retries(1)
                    .set_connection_timeout(Some(self.config.timeout))
                    .set_response_timeout(Some(self.config.timeout));
                let client = Client::open(&*self.config.redis)?;
                ConnectionManager::new_lazy_with_config(client, config)
            })
            .await
    }
}
