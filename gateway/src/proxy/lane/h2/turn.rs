//! Whose bytes are next on a connection that streams share. Streams of one owner share a write;
//! another owner's wait until what is gathered has gone, so that each owner's range of the
//! connection is its own as far as the client's window allows.

use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::owner::OwnerId;

/// The connection's turn. At most as many wait as there are streams.
#[derive(Default)]
pub struct Turn {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Who has handed over what has not been sent.
    owner: Option<OwnerId>,
    waiting: Vec<Waker>,
}

impl Turn {
    /// Waits until `owner` may hand bytes over.
    pub async fn take(&self, owner: OwnerId) {
        poll_fn(|cx| {
            let mut state = self.lock();
            if state.owner.is_none_or(|other| other == owner) {
                state.owner = Some(owner);
                return Poll::Ready(());
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Everything handed over was sent. True when somebody waited for that.
    pub fn ends(&self) -> bool {
        let mut state = self.lock();
        state.owner = None;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        let waited = !waiting.is_empty();
        waiting.into_iter().for_each(Waker::wake);
        waited
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    #[test]
    fn one_owner_after_the_other() {
        let turn = Turn::default();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(pin!(turn.take(OwnerId(1))).poll(&mut cx).is_ready());
        assert!(pin!(turn.take(OwnerId(1))).poll(&mut cx).is_ready());
        let mut other = pin!(turn.take(OwnerId(2)));
        assert!(other.as_mut().poll(&mut cx).is_pending());
        assert!(turn.ends());
        assert!(other.as_mut().poll(&mut cx).is_ready());
        assert!(!turn.ends());
    }
}
