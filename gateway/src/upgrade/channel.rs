//! What two processes of a gateway say to each other while one takes over from the other: short
//! messages over a socket pair that nobody else has an end of, with descriptors beside them.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    sockopt::{Timeout, set_socket_timeout},
};
use serde::{Deserialize, Serialize};

use crate::attribution::{Claim, ClaimKey};
use crate::{class::ClassId, owner::OwnerId};

/// The longest message; lists are sent in pieces of [`PIECE`].
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Elements of a list in one message.
const PIECE: usize = 512;

/// One message. Those with a descriptor say so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// Old → new: who I am.
    Offer(Offer),
    /// Old → new, with a descriptor: the socket that listens on this address.
    Listener(String),
    /// Old → new, with a descriptor: the lock on the pin directory.
    PinsLock,
    /// Old → new, with a descriptor: the lock on the ledger's directory.
    LedgerLock,
    /// Old → new: that was all; get ready.
    Prepare,
    /// New → old: everything works; nothing is changed yet.
    Ready,
    /// New → old: why it does not.
    Failed(String),
    /// Old → new: these slots are yours.
    Slots(Vec<u32>),
    /// Old → new: I have posted and stopped; go on.
    Go,
    /// New → old: I serve.
    Serving,
    /// Old → new, while it drains: received bytes whose requests are known now, as
    /// `[from, to, interface, class, bytes, frames, payload bytes]`.
    Claims(Vec<[u64; 7]>),
}

/// What the new process needs to know before anything else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offer {
    /// Lifetime of the kernel maps; None when the old process meters nothing.
    pub(super) epoch: Option<String>,
    /// Where its ledger is; None when it cannot use it.
    pub(super) ledger: Option<String>,
}

/// One end.
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Both ends. Neither survives an exec unless it is handed over on purpose.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(ours), theirs))
    }

    /// The end this process was started with.
    pub(super) fn of(end: OwnedFd) -> Self {
        Self(end)
    }

    /// Another hold on the same end, for another thread.
    pub(super) fn second(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        self.send_with(message, None)
    }

    pub(super) fn send_with(
        &self,
        message: &Message,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > MESSAGE_BYTES_MAX {
            return Err(io::Error::other("a message that is too long"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor]);
        if let Some(descriptors) = &descriptors {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let parts = [IoSlice::new(&text)];
        sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// A list in pieces.
    pub(super) fn send_list<T: Clone>(
        &self,
        list: &[T],
        message: impl Fn(Vec<T>) -> Message,
    ) -> io::Result<()> {
        list.chunks(PIECE)
            .try_for_each(|piece| self.send(&message(piece.to_vec())))
    }

    /// The next message; None when the other end is closed. Without a limit it waits for ever.
    pub(super) fn receive(
        &self,
        limit: Option<Duration>,
    ) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        // A limit of zero would mean none.
        let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
        set_socket_timeout(&self.0, Timeout::Recv, limit)?;
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let read = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            // A profile's timer interrupts.
            rustix::io::retry_on_intr(|| {
                recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
            })?
            .bytes
        };
        if read == 0 {
            return Ok(None);
        }
        let mut descriptor = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptor = descriptors.last();
            }
        }
        Ok(Some((serde_json::from_slice(&bytes[..read])?, descriptor)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A claim as it travels.
pub(super) fn row(claim: &Claim) -> [u64; 7] {
    [
        claim.key.from.0.into(),
        claim.key.to.0.into(),
        claim.key.ifindex.into(),
        claim.key.class.0.into(),
        claim.bytes,
        claim.frames,
        claim.payload_bytes,
    ]
}

/// What it was; None for numbers that are none of ours.
pub(super) fn claim(row: &[u64; 7]) -> Option<Claim> {
    let [from, to, ifindex, class, bytes, frames, payload_bytes] = *row;
    Some(Claim {
        key: ClaimKey {
            from: OwnerId(from.try_into().ok()?),
            to: OwnerId(to.try_into().ok()?),
            ifindex: ifindex.try_into().ok()?,
            class: ClassId(class.try_into().ok()?),
        },
        bytes,
        frames,
        payload_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order_and_an_end_is_seen() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::of(theirs);
        let file = tempfile::tempfile().unwrap();
        ours.send_with(&Message::Listener("127.0.0.1:1".into()), Some(file.as_fd()))
            .unwrap();
        let slots: Vec<u32> = (0..10_000).map(|slot| slot * 100_000).collect();
        let sender = std::thread::spawn(move || {
            ours.send_list(&slots, Message::Slots).unwrap();
            ours.send(&Message::Go).unwrap();
        });
        let limit = Some(Duration::from_secs(10));
        let (first, descriptor) = theirs.receive(limit).unwrap().unwrap();
        assert_eq!(first, Message::Listener("127.0.0.1:1".into()));
        assert!(descriptor.is_some());
        let mut received = Vec::new();
        loop {
            match theirs.receive(limit).unwrap() {
                Some((Message::Slots(piece), None)) => received.extend(piece),
                other => {
                    assert_eq!(other.unwrap().0, Message::Go);
                    break;
                }
            }
        }
        assert_eq!(received.len(), 10_000);
        assert_eq!(received[9_999], 999_900_000);
        sender.join().unwrap();
        assert!(theirs.receive(limit).unwrap().is_none());
    }

    #[test]
    fn who_says_nothing_is_not_waited_for() {
        let (ours, _theirs) = Channel::pair().unwrap();
        let error = ours.receive(Some(Duration::from_millis(20))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_claim_is_the_same_at_the_other_end() {
        let sent = Claim {
            key: ClaimKey {
                from: OwnerId(1),
                to: OwnerId(2),
                ifindex: 3,
                class: ClassId(4),
            },
            bytes: 5,
            frames: 6,
            payload_bytes: 7,
        };
        assert_eq!(claim(&row(&sent)), Some(sent));
    }
}
