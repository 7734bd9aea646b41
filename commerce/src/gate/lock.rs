//! A lock in Redis that runs out: it keeps two processes from the same work, and is never
//! what correctness rests on.

use std::time::Duration;

use redis::{RedisError, Script};
use uuid::Uuid;

/// A lock that was taken. It ends by [`Lock::release`] or by itself.
#[derive(Debug)]
pub struct Lock {
    name: String,
    /// Tells this holder from its successor.
    token: String,
}

impl Lock {
    /// Takes the lock for at most `duration`; `None` when somebody holds it.
    ///
    /// # Errors
    /// [`RedisError`]
    pub async fn acquire(
        redis: &mut impl redis::aio::ConnectionLike,
        name: &str,
        duration: Duration,
    ) -> Result<Option<Self>, RedisError> {
        let token = Uuid::new_v4().to_string();
        let milliseconds = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let taken: Option<String> = redis::cmd("SET")
            .arg(name)
            .arg(&token)
            .arg("NX")
            .arg("PX")
            .arg(milliseconds)
            .query_async(redis)
            .await?;
        Ok(taken.map(|_| Self {
            name: name.to_owned(),
            token,
        }))
    }

    /// Gives it back, unless it has run out and is another's now.
    ///
    /// # Errors
    /// [`RedisError`]
    pub async fn release(
        self,
        redis: &mut impl redis::aio::ConnectionLike,
    ) -> Result<(), RedisError> {
        if crate::mutant::Mutant::LockDelete.is_on() {
            return redis::cmd("DEL").arg(&self.name).exec_async(redis).await;
        }
        Script::new(include_str!("unlock.lua"))
            .key(&self.name)
            .arg(&self.token)
            .invoke_async::<i64>(redis)
            .await
            .map(drop)
    }
}
