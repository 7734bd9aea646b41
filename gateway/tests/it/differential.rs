//! The kernel's parser against another one: tens of thousands of generated and mutated frames go
//! through the TC programs and through etherparse, and both must say the same.
//!
//! For each of the [`frames`], the [`reference`] works out, from what etherparse found, the one
//! place that must grow and by how much. Where the two parsers differ on purpose, a [`Rule`] says
//! so and why.

mod frames;
mod reference;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use aya::Ebpf;
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use edgemeter::kernel::{self, Maps, Options, Reading};
use flow_abi::{
    Account, AccountKey, CLASS_DEFAULT, Cell, FlowKey, InterfaceCells, OWNER_FOREIGN, cell, name,
};

use frames::{Frame, generate};
use reference::{Expected, Place, Rule, expect};

/// Frame `n` is made from `SEED + n` alone.
const SEED: u64 = 0x0edb_e7e5_2026_0001;
const FRAMES: u64 = 40_000;
/// Frames on one load of the programs: small enough for its flows to be read as a whole.
const BATCH: u64 = 2_000;
/// `TC_ACT_UNSPEC`: the next program, or the stack, decides.
const UNSPEC: u32 = u32::MAX;
/// The interface of a test run.
const LOOPBACK: u32 = 1;
const DIRECTIONS: [(usize, &str); 2] = [(0, name::INGRESS), (1, name::EGRESS)];

/// `(bytes, frames)` of a flow by direction.
type FlowSums = HashMap<FlowKey, [(u64, u64); 2]>;

/// The loaded programs, and what their maps must hold.
struct Meter {
    ebpf: Ebpf,
    maps: Maps,
    cells: InterfaceCells,
    accounts: HashMap<AccountKey, Account>,
    flows: FlowSums,
}

impl Meter {
    fn load() -> Self {
        let options = Options {
            flows_max: 8192,
            ..crate::kernel::options()
        };
        let (ebpf, maps) = kernel::load_for_test(&options).expect("the object loads");
        maps.make_cells(LOOPBACK).unwrap();
        Self {
            ebpf,
            maps,
            cells: InterfaceCells::default(),
            accounts: HashMap::new(),
            flows: HashMap::new(),
        }
    }

    /// False when the kernel refuses to run this frame, which it must only do to short ones.
    fn run(&self, program: &str, frame: &Frame) -> Result<bool, String> {
        let program: &SchedClassifier = self.ebpf.program(program).unwrap().try_into().unwrap();
        // `__sk_buff` takes gso_segs at 164 and gso_size at 176.
        let mut context = [0u8; 192];
        context[164..168].copy_from_slice(&frame.gso_segs.to_ne_bytes());
        context[176..180].copy_from_slice(&frame.gso_size.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame.bytes);
        if frame.gso_size != 0 {
            options.ctx_in = Some(&context);
        }
        let needed = match frame.bytes[12..14] {
            [0x08, 0x00] => 14 + 20,
            [0x86, 0xdd] => 14 + 40,
            _ => 14 + 1,
        };
        match program.test_run(options) {
            Ok(result) if result.return_value == UNSPEC => Ok(true),
            Ok(result) => Err(format!("the verdict was {}", result.return_value)),
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::EINVAL)
                    && frame.bytes.len() < needed =>
            {
                Ok(false)
            }
            Err(error) => Err(format!("the kernel refused it: {error}")),
        }
    }

    fn add(&mut self, direction: usize, expected: &Expected) {
        let cells = &mut self.cells.cells[direction];
        let mut grow = |number: usize| {
            cells[number].bytes += expected.bytes;
            cells[number].frames += expected.frames;
        };
        grow(cell::TOTAL);
        let key = match expected.place {
            Place::Cell(number) => return grow(number),
            Place::Flow(key) => key,
        };
        let flow = &mut self.flows.entry(key).or_default()[direction];
        flow.0 += expected.bytes;
        flow.1 += expected.frames;
        let account = self
            .accounts
            .entry(AccountKey {
                owner: OWNER_FOREIGN,
                ifindex: LOOPBACK,
                class: CLASS_DEFAULT,
            })
            .or_default();
        let (bytes, frames, payload) = if direction == 0 {
            (
                &mut account.rx_bytes,
                &mut account.rx_frames,
                &mut account.rx_payload_bytes,
            )
        } else {
            (
                &mut account.tx_bytes,
                &mut account.tx_frames,
                &mut account.tx_payload_bytes,
            )
        };
        *bytes += expected.bytes;
        *frames += expected.frames;
        *payload += expected.payload;
    }

    /// Cells and accounts: few enough to be read after each frame.
    fn check_sums(&self) -> Result<(), String> {
        let reading: Reading = self.maps.read().unwrap();
        let cells = reading.interfaces[&LOOPBACK];
        if reading.gap_bytes() != 0 {
            return Err(format!("{} bytes are nowhere", reading.gap_bytes()));
        }
        if reading.orphans != [Cell::default(); 2] {
            return Err(format!("orphans: {:?}", reading.orphans));
        }
        if cells == self.cells && reading.accounts == self.accounts {
            return Ok(());
        }
        let mut text = String::new();
        for direction in 0..2 {
            for (number, name) in cell::NAMES.iter().enumerate() {
                let (want, got) = (
                    self.cells.cells[direction][number],
                    cells.cells[direction][number],
                );
                if want != got {
                    let _ = writeln!(text, "  {name}[{direction}]: want {want:?}, got {got:?}");
                }
            }
        }
        if reading.accounts != self.accounts {
            let (want, got) = (&self.accounts, &reading.accounts);
            let _ = writeln!(text, "  accounts: want {want:?}\n            got  {got:?}");
        }
        Err(text)
    }

    /// Every flow there is: none more, none less, none other.
    fn check_flows(&self) -> Result<(), String> {
        let mut found = FlowSums::new();
        self.maps
            .read_flows(|key, flow| {
                let sums = [
                    (flow.rx_bytes, flow.rx_frames),
                    (flow.tx_bytes, flow.tx_frames),
                ];
                found.insert(key, sums);
            })
            .unwrap();
        if found == self.flows {
            return Ok(());
        }
        let mut text = String::new();
        for (key, sums) in &self.flows {
            if found.get(key) != Some(sums) {
                let _ = writeln!(text, "  want {key:?} {sums:?}, got {:?}", found.get(key));
            }
        }
        for (key, sums) in &found {
            if !self.flows.contains_key(key) {
                let _ = writeln!(text, "  want nothing, got {key:?} {sums:?}");
            }
        }
        Err(text)
    }

    /// One frame in one direction. None when the kernel would not run it.
    fn meter(&mut self, seed: u64, direction: usize, frame: &Frame) -> Option<Expected> {
        let expected = expect(frame, direction);
        let ran = self.run(DIRECTIONS[direction].1, frame);
        if ran == Ok(true) {
            self.add(direction, &expected);
        }
        let outcome = ran.and_then(|ran| self.check_sums().map(|()| ran));
        match outcome {
            Ok(ran) => ran.then_some(expected),
            Err(text) => panic!("{}", report(seed, direction, frame, &text)),
        }
    }
}

fn report(seed: u64, direction: usize, frame: &Frame, text: &str) -> String {
    let expected = expect(frame, direction);
    format!(
        "seed {seed:#x}, {}, gso_size {}, gso_segs {}, {} bytes:\n{}\nexpected {expected:?}\n{text}",
        DIRECTIONS[direction].1,
        frame.gso_size,
        frame.gso_segs,
        frame.bytes.len(),
        hex(&frame.bytes),
    )
}

/// A batch's flows were not as expected: the frame to blame, found one by one.
fn blame(seeds: std::ops::Range<u64>, whole: &str) -> ! {
    let mut meter = Meter::load();
    for seed in seeds {
        let frame = generate(seed);
        for (direction, _) in DIRECTIONS {
            meter.meter(seed, direction, &frame);
            if let Err(text) = meter.check_flows() {
                panic!("{}", report(seed, direction, &frame, &text));
            }
        }
    }
    panic!("flows differed after the batch, but after no single frame of it:\n{whole}");
}

fn number(length: usize) -> u64 {
    u64::try_from(length).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[test]
fn the_kernels_parser_agrees_with_another() {
    crate::require_root();
    let started = std::time::Instant::now();
    let mut places = BTreeMap::<&str, u64>::new();
    let mut rules = BTreeMap::<Rule, u64>::new();
    let (mut refused, mut segmented) = (0, 0);
    for first in (SEED..SEED + FRAMES).step_by(usize::try_from(BATCH).unwrap()) {
        let mut meter = Meter::load();
        for seed in first..first + BATCH {
            let frame = generate(seed);
            for (direction, _) in DIRECTIONS {
                let Some(expected) = meter.meter(seed, direction, &frame) else {
                    refused += 1;
                    continue;
                };
                let place = match expected.place {
                    Place::Cell(number) => cell::NAMES[number],
                    Place::Flow(_) => "flow",
                };
                *places.entry(place).or_default() += 1;
                segmented += u64::from(expected.frames > 1);
                for rule in expected.rules {
                    *rules.entry(rule).or_default() += 1;
                }
            }
        }
        if let Err(text) = meter.check_flows() {
            blame(first..first + BATCH, &text);
        }
    }
    println!(
        "{} runs in {:?}: {places:?}, {segmented} in segments, {refused} refused; {rules:?}",
        2 * FRAMES,
        started.elapsed(),
    );
    assert!(refused * 10 < 2 * FRAMES, "{refused} frames were not run");
    // A generator that no longer makes a kind of frame proves nothing about it.
    for place in [
        "flow",
        "non_ip",
        "icmp",
        "other_l4",
        "fragment",
        "unparsable",
    ] {
        assert!(
            places.get(place).is_some_and(|runs| *runs > 1000),
            "{place}"
        );
    }
    assert!(segmented > 1000, "{segmented} runs in segments");
    assert_eq!(rules.len(), 11, "a rule nothing needs: {rules:?}");
}
