//! Classic bugs, on purpose. Each is caught by a named test: `cargo xtask mutants` proves it.
//!
//! They exist only in builds with the feature `mutants`, where `COMMERCE_MUTANT` names the
//! one that is on.

/// A classic bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// A lock that ran out is deleted by its old holder: its successor's, then.
    LockDelete,
    /// A reused buffer keeps what the last request left in it.
    PooledBuffer,
    /// Events count as delivered once they are in memory.
    ChannelEvents,
    /// Money is split in floats, each share rounded on its own.
    FloatMoney,
    /// An experiment ships at the first look that looks good.
    Peeking,
    /// A place in a group is checked before the command is queued, and taken unconditionally.
    CheckThenAct,
}

impl Mutant {
    /// Whether it is on.
    #[cfg(feature = "mutants")]
    pub(crate) fn is_on(self) -> bool {
        static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        let name = match self {
            Self::LockDelete => "lock-delete",
            Self::PooledBuffer => "pooled-buffer",
            Self::ChannelEvents => "channel-events",
            Self::FloatMoney => "float-money",
            Self::Peeking => "peeking",
            Self::CheckThenAct => "check-then-act",
        };
        let chosen = CHOSEN.get_or_init(|| std::env::var("COMMERCE_MUTANT").ok());
        chosen.as_deref() == Some(name)
    }

    /// It is not even there.
    #[cfg(not(feature = "mutants"))]
    pub(crate) const fn is_on(self) -> bool {
        false
    }
}
