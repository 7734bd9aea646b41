//! Ground truth: what the far end of a cable saw.
//!
//! Interface counters are not that: with GRO a veth misses headers, and accelerated VLAN tags
//! are not in them. A capture at the far end, where nothing is merged or left uncut (see
//! [`crate::netns::Topology`]), has every frame with its length on the wire.
//!
//! A capture that lost a frame proves nothing, so losing one is an error.

mod pcap;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::netns::{Mac, Namespace};
pub use pcap::{FiveTuple, Segment};

/// Enough for Ethernet, two VLAN tags, IPv6 and TCP without options.
const SNAPSHOT_BYTES: &str = "96";
/// tcpdump's kernel buffer: more than a test's burst between two reads.
const BUFFER_KIB: &str = "65536";
const START_DEADLINE: Duration = Duration::from_secs(10);
/// The kernel hands over partly filled blocks after a timeout of up to a second, and tcpdump
/// reads them one by one. Immediate mode would avoid the wait, but its fixed-size slots fill up
/// sooner under load.
const FLUSH: Duration = Duration::from_millis(2200);
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// Frames and their bytes on the wire: the link layer with VLAN tags, without preamble and
/// checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Frames.
    pub frames: u64,
    /// Bytes of these frames, headers included.
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, frame_bytes: u32) {
        self.frames += 1;
        self.bytes += u64::from(frame_bytes);
    }
}

/// Everything a capture saw, summed up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capture {
    total: Count,
    by_source: BTreeMap<Mac, Count>,
    by_destination: BTreeMap<Mac, Count>,
    by_flow: BTreeMap<FiveTuple, Count>,
    segments: Vec<Segment>,
}

impl Capture {
    /// Every frame, both directions.
    #[must_use]
    pub fn total(&self) -> Count {
        self.total
    }

    /// Frames whose source is this address.
    #[must_use]
    pub fn sent_by(&self, mac: Mac) -> Count {
        self.by_source.get(&mac).copied().unwrap_or_default()
    }

    /// Frames whose destination is this address; broadcast and multicast are not.
    #[must_use]
    pub fn sent_to(&self, mac: Mac) -> Count {
        self.by_destination.get(&mac).copied().unwrap_or_default()
    }

    /// TCP and UDP by 5-tuple, one direction each. Fragments and anything else are in the
    /// totals only.
    #[must_use]
    pub fn flows(&self) -> &BTreeMap<FiveTuple, Count> {
        &self.by_flow
    }

    /// TCP frames, in the order of the wire.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

/// A running capture; dropping it without [`FarEnd::stop`] kills it and forgets what it saw.
#[derive(Debug)]
pub struct FarEnd {
    tcpdump: Child,
    said: mpsc::Receiver<String>,
    /// Holds the file; removed with us.
    _directory: tempfile::TempDir,
    file: PathBuf,
}

impl FarEnd {
    /// Starts capturing on an interface; when this returns, every later frame counts.
    ///
    /// # Errors
    /// When tcpdump is missing, cannot open the interface, or does not start in time.
    pub fn start(namespace: &Namespace, device: &str) -> Result<Self> {
        let directory = tempfile::tempdir().context("creating a directory for the capture")?;
        let file = directory.path().join("far.pcap");
        let mut tcpdump = namespace
            .command("tcpdump")?
            .args(["-i", device, "-n", "-s", SNAPSHOT_BYTES, "-B", BUFFER_KIB])
            // Stay root: Debian's tcpdump would become a user that cannot write here.
            .args(["-Z", "root", "-w"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting tcpdump")?;
        let stderr = tcpdump
            .stderr
            .take()
            .context("tcpdump has no standard error")?;
        let running = Self {
            said: lines_of(stderr),
            tcpdump,
            _directory: directory,
            file,
        };
        running.wait_until_listening(device)?;
        Ok(running)
    }

    /// Waits for the buffers, ends the capture and sums it up.
    ///
    /// # Errors
    /// When the kernel dropped a frame, or the file is not a complete Ethernet capture.
    pub fn stop(mut self) -> Result<Capture> {
        std::thread::sleep(FLUSH);
        self.signal(libc::SIGINT)?;
        let mut said = vec![];
        // The lines end when tcpdump closes its standard error, by ending.
        loop {
            match self.said.recv_timeout(STOP_DEADLINE) {
                Ok(line) => said.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => bail!("tcpdump does not end on SIGINT"),
            }
        }
        let status = self.tcpdump.wait().context("waiting for tcpdump")?;
        ensure!(
            status.success(),
            "tcpdump failed ({status}): {}",
            said.join("; ")
        );
        check_complete(&said)?;
        let file = std::fs::File::open(&self.file).context("opening the capture")?;
        pcap::sum_up(BufReader::new(file))
    }

    fn wait_until_listening(&self, device: &str) -> Result<()> {
        let mut said = vec![];
        loop {
            match self.said.recv_timeout(START_DEADLINE) {
                Ok(line) if line.contains("listening on") => return Ok(()),
                Ok(line) => said.push(line),
                Err(_) => bail!("tcpdump does not listen on {device}: {}", said.join("; ")),
            }
        }
    }

    fn signal(&self, signal: i32) -> Result<()> {
        let pid = i32::try_from(self.tcpdump.id()).context("tcpdump's process id")?;
        // SAFETY: kill takes two integers; the child is not waited for yet, so the id is its.
        if unsafe { libc::kill(pid, signal) } == 0 {
            return Ok(());
        }
        Err(std::io::Error::last_os_error()).context("signalling tcpdump")
    }
}

impl Drop for FarEnd {
    fn drop(&mut self) {
        // Both fail when it has ended already, which is what they are for.
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
    }
}

/// Reads on a thread of its own, which ends with tcpdump: a full pipe would stop it.
fn lines_of(stderr: ChildStderr) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                // Nobody listens any more, but the pipe must still be emptied.
            }
        }
    });
    receiver
}

/// tcpdump's last words must say that nothing was dropped; silence is not enough.
fn check_complete(said: &[String]) -> Result<()> {
    let dropped = said
        .iter()
        .find(|line| line.contains("dropped by kernel"))
        .with_context(|| format!("tcpdump did not say what it dropped: {}", said.join("; ")))?;
    ensure!(
        dropped.starts_with("0 "),
        "the capture is not complete: {dropped}"
    );
    // This line is there only when an interface reports drops of its own.
    if let Some(line) = said
        .iter()
        .find(|line| line.contains("dropped by interface"))
    {
        ensure!(
            line.starts_with("0 "),
            "the capture is not complete: {line}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
