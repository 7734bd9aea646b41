//! TC programs of other owners beside ours: before and after, under TCX and as clsact filters,
//! with every verdict that lets a packet pass. They stay attached and go on seeing packets through
//! our start, kill -9, upgrade and detach, and we count what passes.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site, assert_equal_to_far_ends};

const MAP_CREATE: i32 = 0;
const LOOKUP: i32 = 1;
const PROG_LOAD: i32 = 5;
const OBJ_PIN: i32 = 6;
const LINK_CREATE: i32 = 28;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
const AFTER: u32 = 1 << 4;
/// `TC_ACT_UNSPEC`, which is TCX's next as well.
const NEXT: i32 = -1;
/// `TC_ACT_OK`.
const PASS: i32 = 0;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;

/// Attributes as the kernel reads them, byte by byte: no crate offers programs without an object.
#[derive(Default)]
struct Attr(Vec<u8>);

impl Attr {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn call(mut self, command: i32) -> io::Result<i64> {
        self.0.resize(128, 0);
        // SAFETY: 128 bytes of attributes, zero where the command knows none; what they point at
        // lives in the caller.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }
    fn open(self, command: i32) -> OwnedFd {
        let fd = self.call(command).unwrap();
        // SAFETY: a descriptor the kernel has just given us.
        unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) }
    }
}

fn raw(fd: &OwnedFd) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap()
}

fn instruction(code: u8, registers: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([code, registers, low, high, a, b, c, d])
}

/// A program that counts what it sees and returns `verdict`; of a hundred packets longer than
/// 200 bytes it drops `drops`.
pub struct Foreign {
    program: OwnedFd,
    counts: OwnedFd,
}

impl Foreign {
    pub fn load(verdict: i32, drops: i32) -> Self {
        // An array of two u64: seen, dropped.
        let counts = Attr::default().u32(2).u32(4).u32(8).u32(2).open(MAP_CREATE);
        let map = i32::try_from(raw(&counts)).unwrap();
        let count = |index: i32, then: &mut Vec<u64>| {
            then.extend([
                instruction(0x62, 0x0a, -4, index), // *(u32 *)(r10 - 4) = index
                instruction(0xbf, 0xa2, 0, 0),      // r2 = r10
                instruction(0x07, 0x02, 0, -4),     // r2 += -4
                instruction(0x18, 0x11, 0, map),    // r1 = the map
                0,
                instruction(0x85, 0, 0, 1),    // r0 = lookup(r1, r2)
                instruction(0x15, 0x00, 2, 0), // if r0 == 0 skip
                instruction(0xb7, 0x01, 0, 1), // r1 = 1
                instruction(0xdb, 0x10, 0, 0), // lock *(u64 *)r0 += r1
            ]);
        };
        let mut code = vec![instruction(0xbf, 0x16, 0, 0)]; // r6 = context
        count(0, &mut code);
        if drops > 0 {
            let mut drop = Vec::new();
            count(1, &mut drop);
            drop.extend([instruction(0xb7, 0, 0, SHOT), instruction(0x95, 0, 0, 0)]);
            let over = i16::try_from(drop.len()).unwrap();
            code.extend([
                instruction(0x61, 0x67, 0, 0),          // r7 = skb->len
                instruction(0xb5, 0x07, over + 3, 200), // if r7 <= 200 go on
                instruction(0x85, 0, 0, 7),             // r0 = random
                instruction(0x94, 0x00, 0, 100),        // w0 %= 100
                instruction(0x35, 0x00, over, drops),   // if r0 >= drops go on
            ]);
            code.extend(drop);
        }
        code.extend([instruction(0xb7, 0, 0, verdict), instruction(0x95, 0, 0, 0)]);
        let mut said = vec![0u8; 65536];
        let licence = c"GPL";
        let attr = Attr::default()
            .u32(3)
            .u32(u32::try_from(code.len()).unwrap())
            .u64(code.as_ptr() as u64)
            .u64(licence.as_ptr() as u64)
            .u32(1)
            .u32(u32::try_from(said.len()).unwrap())
            .u64(said.as_mut_ptr() as u64);
        let program = match attr.call(PROG_LOAD) {
            // SAFETY: a descriptor the kernel has just given us.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) },
            Err(error) => panic!("{error}: {}", String::from_utf8_lossy(&said)),
        };
        Self { program, counts }
    }

    /// As TCX link; gone when the descriptor is closed.
    pub fn link(&self, site: &Site, device: &str, attach_type: u32, order: u32) -> OwnedFd {
        let device = std::ffi::CString::new(device).unwrap();
        let attach = || {
            // SAFETY: a NUL-terminated name.
            let index = unsafe { libc::if_nametoindex(device.as_ptr()) };
            assert!(index > 0);
            Attr::default()
                .u32(raw(&self.program))
                .u32(index)
                .u32(attach_type)
                .u32(order)
                .open(LINK_CREATE)
        };
        site.hosts.gateway.run(attach).unwrap()
    }

    /// As clsact filter of this priority.
    fn filter(&self, site: &Site, device: &str, direction: &str, priority: u16) {
        let pin = format!(
            "/sys/fs/bpf/foreign-{}-{direction}",
            site.hosts.gateway.name()
        );
        let path = std::ffi::CString::new(pin.clone()).unwrap();
        let attr = Attr::default()
            .u64(path.as_ptr() as u64)
            .u32(raw(&self.program));
        attr.call(OBJ_PIN).unwrap();
        // Not `tc -n`: that mounts another /sys, in which nothing is pinned.
        let mut add = site.hosts.gateway.command("tc").unwrap();
        add.args(["filter", "add", "dev", device, direction]);
        add.args([
            "prio",
            &priority.to_string(),
            "bpf",
            "da",
            "object-pinned",
            &pin,
        ]);
        let added = xtask::host::run(&mut add);
        std::fs::remove_file(&pin).unwrap();
        added.unwrap();
    }

    /// Packets seen, and dropped.
    pub fn counts(&self) -> [u64; 2] {
        [0u32, 1].map(|key| {
            let mut value = 0u64;
            let attr = Attr::default().u32(raw(&self.counts)).u32(0);
            let attr = attr
                .u64((&raw const key) as u64)
                .u64((&raw mut value) as u64);
            attr.call(LOOKUP).unwrap();
            value
        })
    }
}

fn beside(
    name: &str,
    attach: &'static str,
    begin: impl FnOnce(&Site, &[Foreign; 4]) -> Vec<OwnedFd>,
) {
    let setup = Setup {
        attach,
        ..Setup::default()
    };
    let mut site = Site::start(name, &setup);
    site.end(libc::SIGTERM);
    let detach = |site: &Site| {
        let (done, said) = site.edgemeter(&["detach", "--config", "edgemeter.toml"]);
        assert!(done, "{said}");
    };
    detach(&site);
    std::fs::remove_dir_all(site.directory.path().join("state")).unwrap();
    // They are there before us.
    let foreign = [NEXT, NEXT, PASS, PASS].map(|verdict| Foreign::load(verdict, 0));
    let _links = begin(&site, &foreign);
    site.launch();
    let captures = site.captures();
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 9);
    let mut before = [[0; 2]; 4];
    let mut progress = |site: &Site, when: &str| {
        load::run(&site.hosts.client, &plan).unwrap();
        let now = [0, 1, 2, 3].map(|number: usize| foreign[number].counts());
        for (number, (now, before)) in now.iter().zip(before).enumerate() {
            assert!(
                now[0] > before[0] + 20,
                "{when}: program {number} saw {before:?}, now {now:?}"
            );
        }
        before = now;
    };
    progress(&site, "beside a running gateway");
    site.quiet();
    site.end(libc::SIGKILL);
    site.launch();
    progress(&site, "after kill -9 and a takeover");
    site.quiet();
    site.end(libc::SIGTERM);
    site.launch();
    progress(&site, "after a restart");
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    site.end(libc::SIGTERM);
    detach(&site);
    site.launch();
    progress(&site, "after detach and a new start");
}

#[test]
fn foreign_tcx_programs_go_on_beside_ours() {
    beside("ft", "tcx", |site, foreign| {
        let device = GATEWAY_TO_CLIENT.device;
        let at = |program: &Foreign, attach_type| program.link(site, device, attach_type, 0);
        vec![
            at(&foreign[0], TCX_INGRESS),
            at(&foreign[1], TCX_EGRESS),
            // These end the chain: whoever came after them would see nothing.
            at(&foreign[2], TCX_INGRESS),
            at(&foreign[3], TCX_EGRESS),
        ]
    });
}

#[test]
fn foreign_clsact_filters_go_on_beside_ours() {
    beside("fc", "clsact", |site, foreign| {
        // Ours has priority 50.
        foreign[0].filter(site, GATEWAY_TO_CLIENT.device, "ingress", 10);
        foreign[1].filter(site, GATEWAY_TO_CLIENT.device, "egress", 10);
        foreign[2].filter(site, GATEWAY_TO_CLIENT.device, "ingress", 90);
        foreign[3].filter(site, GATEWAY_TO_CLIENT.device, "egress", 90);
        Vec::new()
    });
}

/// Loss made by a program of this test's, on our own interface and behind our counting: what it
/// drops has been counted as sent, and is the same route's again when it is sent again.
#[test]
fn what_a_later_program_drops_was_sent_and_stays_its_routes() {
    use crate::talk::{Talk, connect_from, get};
    let site = Site::start("fd", &Setup::default());
    let dropping = Foreign::load(NEXT, 3);
    let _link = dropping.link(&site, GATEWAY_TO_CLIENT.device, TCX_EGRESS, AFTER);
    let capture =
        xtask::capture::FarEnd::start(&site.hosts.client, GATEWAY_TO_CLIENT.far_device).unwrap();
    const BODY: usize = 900_000;
    site.hosts
        .client
        .run(|| {
            let to = (GATEWAY_TO_CLIENT.v4, crate::harness::PLAIN).into();
            let mut talk = Talk::plain(connect_from(0, to));
            for _ in 0..4 {
                for (route, body) in [("small", 100), ("large", BODY)] {
                    talk.ask(route, &get(route, body));
                    talk.send();
                    talk.answer(route, body);
                }
            }
        })
        .unwrap();
    let page = site.quiet();
    let (balances, _) = site.ledger();
    let sent = balances
        .cells()
        .find(|(interface, direction, number, _, _)| {
            let total = *number == flow_abi::cell::TOTAL && *direction == flow_abi::Direction::Tx;
            total && *interface == GATEWAY_TO_CLIENT.device
        })
        .map_or(0, |(_, _, _, _, frames)| frames);
    let arrived = capture.stop().unwrap().sent_by(GATEWAY_TO_CLIENT.mac);
    let [_, dropped] = dropping.counts();
    assert!(dropped > 0, "nothing was dropped");
    // A dropped buffer may have been a run of frames.
    let missing = u64::try_from(sent).unwrap() - arrived.frames;
    assert!(
        missing >= dropped,
        "{sent} sent, {arrived:?} arrived, {dropped} dropped"
    );
    let of_route = |route: &str, name: &str| {
        page.sum(name, |sample| {
            sample.label("route") == route
                && sample.label("leg") == "client"
                && sample.label("direction") == "tx"
        })
    };
    let bodies = 4 * i128::try_from(BODY).unwrap();
    let large = of_route("large", "edgemeter_wire_bytes_total");
    assert!(large > bodies && large < bodies * 2, "{large}");
    let small = of_route("small", "edgemeter_wire_bytes_total");
    assert!(small < 4 * 2000, "{small} bytes: another route's");
}
