//! A connection meets its slot, with the kernel's programs run by hand: frames on two CPUs at
//! once, claims made while frames come, requests that let go late.

use std::{
    net::{TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use edgemeter::{
    kernel::{self, Maps},
    owner::OwnerId,
    slots::{Before, Connection, Opening, Slots},
};
use flow_abi::{Account, AccountKey, Endpoint, Slot, name, side};
use xtask::netns::Namespace;

use crate::packets::cases;

const LOOPBACK: u32 = 1;
const OVERHEAD: u32 = 7;
const UNCLAIMED: u32 = 8;
const PAYLOAD: u64 = 100;
/// Ethernet, IPv4, TCP with timestamps or not: whatever the crafted frame has.
const FLAGS_ACK_PUSH: u8 = 0x18;

struct Bench {
    ebpf: Ebpf,
    maps: Maps,
    slots: Arc<Slots>,
    memory: MapData,
    listener: TcpListener,
}

/// Needs a network namespace of its own: a test run looks its socket up there.
fn bench() -> Bench {
    let (mut ebpf, maps) = kernel::load_for_test(&crate::kernel::options()).unwrap();
    maps.make_cells(LOOPBACK).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint {
        overhead_owner: OVERHEAD,
        unclaimed_owner: UNCLAIMED,
    };
    maps.set_endpoints(&[(listener.local_addr().unwrap(), side::LISTENER, endpoint)])
        .unwrap();
    let (Map::Array(memory), Map::SkStorage(sockets)) = (
        ebpf.take_map(name::SLOTS).unwrap(),
        ebpf.take_map(name::SOCKET_SLOTS).unwrap(),
    ) else {
        panic!("maps of other types")
    };
    let own = |map: &MapData| -> OwnedFd { map.fd().as_fd().try_clone_to_owned().unwrap() };
    let flows = maps.flows_fd().unwrap();
    let slots = Slots::open(&own(&memory), own(&sockets), flows, 64).unwrap();
    slots.observe(Box::new(|| vec![LOOPBACK]));
    Bench {
        ebpf,
        maps,
        slots,
        memory,
        listener,
    }
}

impl Bench {
    /// A real connection over loopback, which no program of ours observes.
    fn connect(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        (client, self.listener.accept().unwrap().0)
    }

    fn adopt(&self, server: &TcpStream, before: Before) -> Arc<Connection> {
        let opening = Opening {
            overhead: OwnerId(OVERHEAD),
            active: false,
            before,
            addresses: Some((server.local_addr().unwrap(), server.peer_addr().unwrap())),
        };
        self.slots.adopt(server.as_raw_fd(), opening).unwrap()
    }

    fn receive(&self, frame: &[u8]) {
        let program: &SchedClassifier = self
            .ebpf
            .program(name::INGRESS)
            .unwrap()
            .try_into()
            .unwrap();
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        program.test_run(options).unwrap();
    }

    fn account(&self, owner: u32) -> Account {
        let key = AccountKey {
            owner,
            ifindex: LOOPBACK,
            class: 0,
        };
        self.maps
            .read()
            .unwrap()
            .accounts
            .get(&key)
            .copied()
            .unwrap_or_default()
    }

    /// The slots in use.
    fn used(&self) -> Vec<Slot> {
        let id = self.memory.info().unwrap().id();
        let array: Array<_, Slot> = Map::Array(MapData::from_id(id).unwrap())
            .try_into()
            .unwrap();
        array
            .iter()
            .map(Result::unwrap)
            .filter(|slot| slot.generation != 0)
            .collect()
    }
}

/// A frame that the client of this connection might have sent.
fn frame(client: &TcpStream) -> Vec<u8> {
    let case = cases()
        .into_iter()
        .find(|case| case.name == "tcp4")
        .unwrap();
    let mut frame = case.frame;
    let header = frame.len() - usize::try_from(case.payload).unwrap();
    frame.truncate(header);
    frame.resize(header + usize::try_from(PAYLOAD).unwrap(), b'x');
    let total = u16::try_from(frame.len() - 14).unwrap();
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[26..30].copy_from_slice(&[127, 0, 0, 1]);
    frame[30..34].copy_from_slice(&[127, 0, 0, 1]);
    frame[34..36].copy_from_slice(&client.local_addr().unwrap().port().to_be_bytes());
    frame[36..38].copy_from_slice(&client.peer_addr().unwrap().port().to_be_bytes());
    frame[47] = FLAGS_ACK_PUSH;
    frame
}

fn on_cpu(number: usize) {
    // SAFETY: a zeroed set is valid, and the calling thread is meant.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(number, &mut set);
        assert_eq!(
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set),
            0
        );
    }
}

fn inside<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    crate::require_root();
    let namespace = Namespace::create(&Namespace::unique_prefix("bd")).unwrap();
    namespace.run(test).unwrap()
}

/// What came before a slot was there is moved into it once, whichever CPU sees the slot first.
#[test]
fn two_cpus_that_bind_at_once_move_each_byte_once() {
    const EARLY: u64 = 5;
    const EACH: u64 = 40;
    inside(|| {
        let bench = bench();
        assert!(
            std::thread::available_parallelism().unwrap().get() >= 2,
            "one CPU cannot race"
        );
        let mut claimed = 0;
        for round in 1..=60u64 {
            let (client, server) = bench.connect();
            let frame = frame(&client);
            for _ in 0..EARLY {
                bench.receive(&frame);
            }
            let go = AtomicBool::new(false);
            let connection = std::thread::scope(|scope| {
                for cpu in [0, 1] {
                    let (bench, frame, go) = (&bench, &frame, &go);
                    scope.spawn(move || {
                        on_cpu(cpu);
                        while !go.load(Ordering::Acquire) {
                            std::hint::spin_loop();
                        }
                        for _ in 0..EACH {
                            bench.receive(frame);
                        }
                    });
                }
                go.store(true, Ordering::Release);
                bench.adopt(&server, Before::Nothing)
            });
            let took = connection.take_unclaimed();
            let frames = EARLY + 2 * EACH;
            assert_eq!(
                (took.frames, took.bytes, took.payload_bytes),
                (frames, frames * frame.len() as u64, frames * PAYLOAD),
                "round {round}"
            );
            claimed += took.bytes;
            assert_eq!(connection.take_unclaimed().bytes, 0, "taken twice");
            assert_eq!(bench.account(UNCLAIMED).rx_bytes, claimed);
        }
    });
}

/// A claim moves bytes out of an account: it may never find more in the slot than the account
/// has, at any moment.
#[test]
fn a_claim_never_takes_what_no_account_has_yet() {
    inside(|| {
        let bench = bench();
        let (client, server) = bench.connect();
        let frame = frame(&client);
        let connection = bench.adopt(&server, Before::Nothing);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                on_cpu(0);
                for _ in 0..30_000 {
                    bench.receive(&frame);
                }
                over.store(true, Ordering::Release);
            });
            on_cpu(1);
            let (mut taken, mut looks) = (0, 0u64);
            while !over.load(Ordering::Acquire) {
                taken += connection.take_unclaimed().bytes;
                let has = bench.account(UNCLAIMED).rx_bytes;
                assert!(taken <= has, "{taken} claimed of {has}");
                looks += 1;
            }
            assert!(looks > 10, "{looks} looks");
        });
        let all = 30_000 * frame.len() as u64;
        assert_eq!(bench.account(UNCLAIMED).rx_bytes, all);
    });
}

/// A pooled connection may have gone to the next request before this one lets go of it.
#[test]
fn a_late_release_does_not_undo_the_next_requests_claim() {
    inside(|| {
        let bench = bench();
        let (client, server) = bench.connect();
        let frame = frame(&client);
        let connection = bench.adopt(&server, Before::Nothing);
        let (first, _) = connection.claim(OwnerId(21));
        bench.receive(&frame);
        let (second, _) = connection.claim(OwnerId(22));
        connection.release(first);
        bench.receive(&frame);
        bench.receive(&frame);
        let length = frame.len() as u64;
        assert_eq!(bench.account(21).rx_bytes, length);
        assert_eq!(bench.account(22).rx_bytes, 2 * length);
        assert_eq!(connection.received_under(first), length);
        assert_eq!(connection.received_under(second), 2 * length);
        connection.release(second);
        bench.receive(&frame);
        assert_eq!(bench.account(UNCLAIMED).rx_bytes, length, "nobody's again");
        assert_eq!(connection.take_unclaimed().bytes, length);
    });
}

/// More frames than a slot remembers during a handshake are the first request's, and counted.
#[test]
fn what_a_handshake_has_no_room_for_is_the_first_requests() {
    inside(|| {
        let bench = bench();
        let (client, server) = bench.connect();
        let frame = frame(&client);
        let connection = bench.adopt(&server, Before::HandshakeToCome);
        for _ in 0..flow_abi::ARRIVALS + 3 {
            bench.receive(&frame);
        }
        assert_eq!(
            connection.take_unclaimed().frames,
            3,
            "the others wait for their division"
        );
        connection.handshake_over(u64::MAX);
        assert_eq!(bench.slots.undivided.load(Ordering::Relaxed), 1);
        bench.receive(&frame);
        assert_eq!(
            connection.take_unclaimed().frames,
            1,
            "the handshake is over"
        );
        let handshake = connection.take_handshake();
        assert_eq!(handshake.frames, flow_abi::ARRIVALS as u64);
        assert_eq!(connection.take_handshake().frames, 0, "taken twice");
        let in_use = bench.used();
        assert_eq!(in_use.len(), 1);
        assert_eq!(in_use[0].handshaking, 0);
    });
}
