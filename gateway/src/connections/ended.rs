//! How a connection ended, from what its socket saw.

use flow_abi::Connection;

/// `TCP_SYN_SENT`.
const SYN_SENT: u32 = 2;
/// `TCP_ESTABLISHED`.
const ESTABLISHED: u32 = 1;

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum End {
    /// FIN from both sides.
    Closed,
    /// The host reset it.
    ResetSent,
    /// The peer reset it.
    ResetReceived,
    /// The peer answered the SYN with a reset.
    Refused,
    /// Nobody answered the SYN, or the caller gave up.
    Unanswered,
    /// Neither FIN nor reset: the peer fell silent, or the kernel gave up sending.
    TimedOut,
}

impl End {
    /// The word in metrics and listings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::ResetSent => "reset_sent",
            Self::ResetReceived => "reset_received",
            Self::Refused => "refused",
            Self::Unanswered => "unanswered",
            Self::TimedOut => "timed_out",
        }
    }

    /// How this connection ended; meaningless before it has.
    #[must_use]
    pub fn of(connection: &Connection) -> Self {
        if connection.established_ns == 0 || connection.last_state == SYN_SENT {
            return if connection.resets_received > 0 {
                Self::Refused
            } else {
                Self::Unanswered
            };
        }
        // Both: the second reset answers the first, and the host's own came from unread data.
        if connection.resets_received > 0 && connection.resets_sent == 0 {
            Self::ResetReceived
        } else if connection.resets_sent > 0 {
            Self::ResetSent
        } else if connection.last_state == ESTABLISHED {
            Self::TimedOut
        } else {
            Self::Closed
        }
    }
}

/// A TCP state's name, as `ss` prints it.
pub(super) fn state_name(state: u32) -> &'static str {
    match state {
        1 => "established",
        2 => "syn-sent",
        3 => "syn-recv",
        4 => "fin-wait-1",
        5 => "fin-wait-2",
        6 => "time-wait",
        7 => "closed",
        8 => "close-wait",
        9 => "last-ack",
        10 => "listening",
        11 => "closing",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_is_told_from_the_others() {
        let open = Connection {
            established_ns: 1,
            last_state: 9,
            ..Connection::default()
        };
        let end = |connection: Connection| End::of(&connection);
        assert_eq!(end(open), End::Closed);
        assert_eq!(
            end(Connection {
                resets_received: 1,
                ..open
            }),
            End::ResetReceived
        );
        assert_eq!(
            end(Connection {
                resets_sent: 1,
                resets_received: 1,
                ..open
            }),
            End::ResetSent
        );
        assert_eq!(
            end(Connection {
                last_state: ESTABLISHED,
                ..open
            }),
            End::TimedOut
        );
        let never = Connection {
            established_ns: 0,
            last_state: SYN_SENT,
            ..open
        };
        assert_eq!(end(never), End::Unanswered);
        assert_eq!(
            end(Connection {
                resets_received: 1,
                ..never
            }),
            End::Refused
        );
    }
}
