//! Open files: every connection is one, to a client and to a service.

use std::io;

/// How many files this process may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In force.
    pub soft: u64,
    /// Up to which a process may raise it.
    pub hard: u64,
}

impl Limit {
    /// What is in force.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn now() -> io::Result<Self> {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the kernel writes one `rlimit`.
        if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            soft: limit.rlim_cur,
            hard: limit.rlim_max,
        })
    }

    /// Raises the soft limit to the hard one. It is low by default (1,024) for the sake of programs
    /// that use `select`, which this is not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn raise() -> io::Result<Self> {
        let hard = Self::now()?.hard;
        let limit = libc::rlimit {
            rlim_cur: hard,
            rlim_max: hard,
        };
        // SAFETY: the kernel reads one `rlimit`.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { soft: hard, hard })
    }

    /// What to say where the listeners let in more connections than there are files for: each may
    /// need one to a service too.
    #[must_use]
    pub fn complaint(self, connections_max: u64) -> Option<String> {
        let wanted = connections_max.saturating_mul(2);
        (self.hard < wanted).then(|| {
            format!(
                "at most {} open files, for up to {connections_max} client connections and one each to \
                 a service; raise the hard limit (ulimit -Hn, LimitNOFILE=) to {wanted} or lower \
                 listeners.limits.connections_max",
                self.hard
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_are_said_with_what_would_be_enough() {
        let limit = Limit {
            soft: 1024,
            hard: 20_000,
        };
        assert_eq!(limit.complaint(10_000), None);
        let words = limit.complaint(16_384).unwrap();
        assert!(words.contains("at most 20000 open files"), "{words}");
        assert!(words.contains("to 32768 or lower"), "{words}");
    }
}
