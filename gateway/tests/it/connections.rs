//! Connections as the kernel tells them, against what the sockets themselves and netfilter say.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    process::Stdio,
    time::{Duration, Instant},
};

use edgemeter::{
    admin::client,
    config::Config,
    connections::{EventLine, Row},
};
use xtask::{
    exposition::Exposition,
    load::{self, Protocol},
    netns::{GATEWAY_TO_CLIENT, Namespace},
};

use crate::harness::{PLAIN, Setup, Site};

const DEADLINE: Duration = Duration::from_secs(20);
/// Not the gateway's: a service of the host beside it.
const PORT: u16 = 7007;

fn rows(site: &Site, arguments: &[&str]) -> Vec<Row> {
    let mut edgemeter = site
        .hosts
        .gateway
        .command(env!("CARGO_BIN_EXE_edgemeter"))
        .unwrap();
    let output = edgemeter
        .args(["connections", "--json", "--state", "all", "--config"])
        .arg(site.config())
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The row of a closed connection, once it is there.
fn closed(site: &Site, cookie: u64) -> Row {
    let started = Instant::now();
    loop {
        let row = rows(site, &[])
            .into_iter()
            .find(|row| row.cookie == cookie && row.end.is_some());
        if let Some(row) = row {
            return row;
        }
        assert!(
            started.elapsed() < DEADLINE,
            "connection {cookie} does not end: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn events(site: &Site) -> Vec<EventLine> {
    let config = Config::load(site.config()).unwrap();
    let (status, body) = site
        .hosts
        .gateway
        .run(|| client::ask(&config.admin, "GET", "/events").unwrap())
        .unwrap();
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// A listener on the gateway's host, and the command name of the thread that made it.
fn listener(site: &Site) -> (TcpListener, String) {
    let listen = || {
        let command = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        let listener = TcpListener::bind((GATEWAY_TO_CLIENT.v4, PORT)).unwrap();
        (listener, command.trim_end().to_owned())
    };
    site.hosts.gateway.run(listen).unwrap()
}

fn connect(site: &Site) -> TcpStream {
    let address = SocketAddr::from((GATEWAY_TO_CLIENT.v4, PORT));
    site.hosts
        .client
        .run(|| TcpStream::connect(address).unwrap())
        .unwrap()
}

fn cookie(socket: &TcpStream) -> u64 {
    let mut cookie = 0u64;
    option(socket, libc::SOL_SOCKET, libc::SO_COOKIE, &mut cookie);
    cookie
}

/// `struct tcp_info` as far as it is compared.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct TcpInfo {
    head: [u8; 8],
    before: [u32; 23],
    total_retrans: u32,
    rates: [u64; 2],
    bytes_acked: u64,
    bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    notsent_bytes: u32,
    min_rtt: u32,
    more: [u32; 2],
    busy: [u64; 4],
    delivered: [u32; 2],
    bytes: [u64; 2],
    dsack_dups: u32,
    reord_seen: u32,
    rcv_ooopack: u32,
}

fn info(socket: &TcpStream) -> TcpInfo {
    assert_eq!(std::mem::offset_of!(TcpInfo, total_retrans), 100);
    assert_eq!(std::mem::offset_of!(TcpInfo, min_rtt), 148);
    assert_eq!(std::mem::offset_of!(TcpInfo, rcv_ooopack), 224);
    let mut info = TcpInfo::default();
    option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info);
    info
}

fn option<T>(socket: &TcpStream, level: i32, name: i32, value: &mut T) {
    let mut len = libc::socklen_t::try_from(size_of::<T>()).unwrap();
    // SAFETY: the kernel writes at most `len` bytes into plain data.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_mut(value).cast(),
            &raw mut len,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// close() will reset.
fn abort_on_close(socket: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: an option of the given size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            libc::socklen_t::try_from(size_of::<libc::linger>()).unwrap(),
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Drops a share of the data segments that come in, and counts them. Handshakes get through.
fn lose(namespace: &Namespace, port_field: &str, percent: u32) {
    let rules = format!(
        "table inet loss {{\n chain input {{\n type filter hook input priority 0;\n \
         tcp {port_field} {PORT} tcp flags & (fin | syn | rst) == 0 \
         numgen random mod 100 < {percent} counter drop\n }}\n}}\n"
    );
    xtask::host::need(&[xtask::host::Tool::NFT]).unwrap();
    let mut nft = namespace.command("nft").unwrap();
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin
        .take()
        .unwrap()
        .write_all(rules.as_bytes())
        .unwrap();
    assert!(nft.wait().unwrap().success());
}

/// What netfilter says it dropped.
fn lost(namespace: &Namespace) -> u64 {
    let mut nft = namespace.command("nft").unwrap();
    let output = nft
        .args(["list", "table", "inet", "loss"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut words = text
        .split_whitespace()
        .skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

fn send_all(mut from: TcpStream, bytes: usize) -> TcpStream {
    from.write_all(&vec![b'x'; bytes]).unwrap();
    from.shutdown(Shutdown::Write).unwrap();
    from
}

fn read_all(socket: &mut TcpStream) -> usize {
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut sum = 0;
    let mut buffer = vec![0; 65536];
    loop {
        match socket.read(&mut buffer).unwrap() {
            0 => return sum,
            some => sum += some,
        }
    }
}

#[test]
fn a_connection_is_told_as_its_socket_lived_it() {
    const BYTES: usize = 3_000_000;
    let site = Site::start("cl", &Setup::default());
    lose(&site.hosts.client, "sport", 4);
    let (listener, command) = listener(&site);
    let client = connect(&site);
    let (server, _) = listener.accept().unwrap();
    let reader = std::thread::spawn(move || {
        let mut client = client;
        let read = read_all(&mut client);
        (client, read)
    });
    let mut server = send_all(server, BYTES);
    let (client, read) = reader.join().unwrap();
    assert_eq!(read, BYTES);
    drop(client);
    assert_eq!(read_all(&mut server), 0);
    // Both have sent FIN and all is acknowledged: nothing moves any more.
    let cookie = cookie(&server);
    let started = Instant::now();
    while info(&server).bytes_acked < BYTES as u64 {
        assert!(started.elapsed() < DEADLINE);
        std::thread::sleep(Duration::from_millis(10));
    }
    let truth = info(&server);
    drop(server);

    let row = closed(&site, cookie);
    assert!(truth.total_retrans > 0, "4 % loss and no retransmit");
    assert_eq!(row.retransmits, truth.total_retrans, "{row:?}");
    assert_eq!(row.out_of_order, Some(truth.rcv_ooopack));
    assert_eq!(row.min_rtt_us, Some(truth.min_rtt));
    // The SYN and the FIN take a number each.
    let acked = BYTES as u64..=BYTES as u64 + 2;
    assert!(acked.contains(&row.bytes_acked), "{row:?}");
    assert!(row.bytes_received <= 1, "{row:?}");
    assert!(row.lost.unwrap() > 0, "{row:?}");
    assert_eq!(row.end.as_deref(), Some("closed"));
    assert!(!row.opened_here && row.leg.is_none());
    assert!(row.handshake_us.is_some() && row.srtt_us.is_some());
    assert_eq!(
        row.remote.rsplit_once(':').unwrap().0,
        GATEWAY_TO_CLIENT.far_v4.to_string()
    );

    let owner = row.owner.expect("the listening socket's maker is known");
    assert_eq!(owner.pid, std::process::id());
    assert_eq!((owner.command, owner.via.as_str()), (command, "listener"));

    let of_it: Vec<EventLine> = events(&site)
        .into_iter()
        .filter(|event| event.cookie == cookie)
        .collect();
    let count = |name: &str| of_it.iter().filter(|event| event.event == name).count();
    assert_eq!((count("open"), count("close")), (1, 1));
    let sent_again: u32 = of_it
        .iter()
        .filter(|event| event.event == "retransmit")
        .map(|event| event.detail.parse::<u32>().unwrap())
        .sum();
    assert_eq!(sent_again, truth.total_retrans, "each was told at once");
    let page = site.scrape();
    assert_eq!(page.sum("edgemeter_kernel_events_lost_total", |_| true), 0);
}

#[test]
fn drops_are_counted_with_the_kernels_reason_and_reordering_is_seen() {
    const BYTES: usize = 6_000_000;
    let site = Site::start("cd", &Setup::default());
    lose(&site.hosts.gateway, "dport", 15);
    let (listener, _) = listener(&site);
    let client = connect(&site);
    let (mut server, _) = listener.accept().unwrap();
    let writer = std::thread::spawn(move || send_all(client, BYTES));
    assert_eq!(read_all(&mut server), BYTES);
    let cookie = cookie(&server);
    let truth = info(&server);
    drop(server);
    drop(writer.join().unwrap());

    let row = closed(&site, cookie);
    assert!(truth.rcv_ooopack > 0, "15 % loss and nothing out of order");
    assert_eq!(row.out_of_order, Some(truth.rcv_ooopack));
    let truth = lost(&site.hosts.gateway);
    let page = site.scrape();
    let counted = page.sum("edgemeter_dropped_frames_total", |sample| {
        sample.label("reason") == "netfilter_drop"
    });
    assert!(truth > 0);
    assert_eq!(u64::try_from(counted).unwrap(), truth);
    let told = events(&site);
    let told = told.iter().filter(|event| {
        event.event == "drop"
            && event.detail == "netfilter_drop"
            && event.remote == format!("{}:{PORT}", GATEWAY_TO_CLIENT.v4)
    });
    assert_eq!(told.count() as u64, truth);
}

#[test]
fn who_reset_a_connection_is_known() {
    let site = Site::start("cr", &Setup::default());
    let (listener, _) = listener(&site);
    let pair = || {
        let client = connect(&site);
        let (server, _) = listener.accept().unwrap();
        let number = cookie(&server);
        (client, server, number)
    };
    let end = |number| closed(&site, number).end.unwrap();

    let (client, server, number) = pair();
    abort_on_close(&server);
    drop(server);
    assert_eq!(end(number), "reset_sent");
    drop(client);

    let (client, server, number) = pair();
    abort_on_close(&client);
    drop(client);
    assert_eq!(end(number), "reset_received");
    drop(server);

    // Closing with unread data resets too, after the socket has said that it is closed.
    let (mut client, mut server, number) = pair();
    client.write_all(b"unread").unwrap();
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(server.peek(&mut [0; 8]).unwrap(), 6);
    server.write_all(b"bye").unwrap();
    drop(server);
    assert_eq!(end(number), "reset_sent");
    drop(client);

    // Opened here, and refused there.
    let nobody = SocketAddr::from((GATEWAY_TO_CLIENT.far_v4, PORT));
    let refused = site
        .hosts
        .gateway
        .run(|| TcpStream::connect(nobody).is_err())
        .unwrap();
    assert!(refused);
    let started = Instant::now();
    let row = loop {
        let found = rows(
            &site,
            &["--cidr", &nobody.ip().to_string(), "--port", "7007"],
        )
        .into_iter()
        .find(|row| row.end.as_deref() == Some("refused"));
        if let Some(row) = found {
            break row;
        }
        assert!(started.elapsed() < DEADLINE, "{}", site.log());
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(row.opened_here && row.handshake_us.is_none());
    let owner = row.owner.unwrap();
    assert_eq!(
        (owner.pid, owner.via.as_str()),
        (std::process::id(), "connect")
    );
}

/// A directory of the cgroup2 hierarchy, removed when dropped.
struct Cgroup(std::path::PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_containers_connection_names_process_cgroup_and_container() {
    let site = Site::start("co", &Setup::default());
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = table
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .and_then(|line| line.split(' ').nth(4))
        .expect("a cgroup2 file system is mounted");
    let id = format!("{:016x}{:048x}", std::process::id(), 0xc0ffee);
    let cgroup = Cgroup(std::path::Path::new(root).join(format!("docker-{id}.scope")));
    std::fs::create_dir(&cgroup.0).unwrap();

    let far = SocketAddr::from((GATEWAY_TO_CLIENT.far_v4, PORT));
    let listener = site
        .hosts
        .client
        .run(|| TcpListener::bind(far).unwrap())
        .unwrap();
    // It joins the cgroup itself, then connects, and waits to be let go.
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec 3<>/dev/tcp/{}/{PORT} && read -r line <&3",
        cgroup.0.display(),
        far.ip()
    );
    let mut bash = site.hosts.gateway.command("bash").unwrap();
    let mut bash = bash.args(["-c", &script]).spawn().unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    let started = Instant::now();
    let row = loop {
        let mut found = rows(&site, &["--owner", &id[..12]]);
        if let Some(row) = found.pop() {
            break row;
        }
        assert!(started.elapsed() < DEADLINE, "{}", site.log());
        std::thread::sleep(Duration::from_millis(50));
    };
    accepted.write_all(b"go\n").unwrap();
    drop(accepted);
    assert!(bash.wait().unwrap().success());
    let owner = row.owner.unwrap();
    assert_eq!(owner.pid, bash.id());
    assert_eq!(
        (owner.command.as_str(), owner.via.as_str()),
        ("bash", "connect")
    );
    assert_eq!(owner.container.as_deref(), Some(id.as_str()));
    assert_eq!(owner.cgroup, Some(format!("/docker-{id}.scope")));
}

#[test]
fn the_gateways_connections_are_its_listeners_and_upstreams() {
    let site = Site::start("cg", &Setup::default());
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 30);
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let listener = rows(&site, &["--owner", "plain", "--port", &PLAIN.to_string()]);
    assert!(listener.len() >= 3, "{listener:?}");
    assert!(listener.iter().all(|row| {
        !row.opened_here
            && row.leg.as_deref() == Some("client")
            && row
                .owner
                .as_ref()
                .is_some_and(|owner| owner.via == "listener")
    }));
    let upstream = rows(&site, &["--owner", "origin"]);
    assert!(!upstream.is_empty());
    assert!(upstream.iter().all(|row| {
        row.opened_here
            && row.leg.as_deref() == Some("upstream")
            && row
                .owner
                .as_ref()
                .is_some_and(|owner| owner.via == "connect")
    }));
    let page = site.scrape();
    let opened = page.sum("edgemeter_connections_opened_total", |sample| {
        sample.label("endpoint") == "plain"
    });
    assert_eq!(usize::try_from(opened).unwrap(), listener.len());
    let text = rows(&site, &["--cidr", "192.0.2.0/24"]);
    assert!(text.is_empty(), "{text:?}");
}

/// Ten times as many events as the ring holds, while nobody reads it: what is lost is counted, and
/// no connection is lost with its events.
#[test]
fn events_lost_to_a_full_ring_are_counted_and_their_connections_are_not_lost() {
    const QUICK: usize = 300;
    const BURST: usize = 6_000;
    let site = Site::start("ce", &Setup::default());
    let (listener, _) = listener(&site);
    let come_and_go = |count: usize| {
        for _ in 0..count {
            let client = connect(&site);
            let (server, _) = listener.accept().unwrap();
            // A reset leaves no TIME_WAIT, and ports to connect from.
            abort_on_close(&client);
            drop(client);
            drop(server);
        }
    };
    let told = |page: &Exposition, name: &str, event: &str| {
        usize::try_from(page.sum(name, |sample| sample.label("event") == event)).unwrap()
    };
    let (heard, lost) = (
        "edgemeter_kernel_events_total",
        "edgemeter_kernel_events_lost_total",
    );
    let ended = |page: &Exposition| {
        let closed = page.sum("edgemeter_connections_closed_total", |sample| {
            sample.label("endpoint") == "(other)"
        });
        usize::try_from(closed).unwrap()
    };
    // Each look at the metrics is a connection too.
    site.quiet();
    // The last of those before this may not have ended.
    let looks = std::cell::Cell::new(2);
    let look = || {
        looks.set(looks.get() + 1);
        site.scrape()
    };
    let begin = look();
    let wait = |count: usize| {
        let started = Instant::now();
        loop {
            let page = look();
            let ended = ended(&page) - ended(&begin);
            if ended >= count {
                return page;
            }
            assert!(started.elapsed() < DEADLINE, "{ended} of {count}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let are = |what: &str, found: usize, count: usize| {
        // Both ends of a look are on this host.
        let most = count + 2 * looks.get();
        assert!(
            (count..=most).contains(&found),
            "{what}: {found} of {count} to {most}"
        );
    };
    come_and_go(QUICK);
    let page = wait(QUICK);
    are(
        "open",
        told(&page, heard, "open") - told(&begin, heard, "open"),
        QUICK,
    );
    assert_eq!(told(&page, lost, "open"), 0);
    looks.set(looks.get() + 1);
    let mut delays: Vec<u64> = events(&site).iter().map(|event| event.delay_ns).collect();
    delays.sort_unstable();
    let at = |percent: usize| delays[delays.len() * percent / 100] / 1000;
    println!(
        "from the kernel's event to its metric: p50 {} us, p99 {} us of {} events",
        at(50),
        at(99),
        delays.len()
    );
    site.signal(libc::SIGSTOP);
    come_and_go(BURST);
    site.signal(libc::SIGCONT);
    let page = wait(QUICK + BURST);
    for event in ["open", "close"] {
        let all = |page: &Exposition| told(page, heard, event) + told(page, lost, event);
        are(event, all(&page) - all(&begin), QUICK + BURST);
    }
    assert!(told(&page, lost, "open") > 0, "the ring held them all");
    are("ended", ended(&page) - ended(&begin), QUICK + BURST);
}

#[test]
fn connections_from_before_the_start_are_listed_until_they_end() {
    let mut site = Site::start("cb", &Setup::default());
    site.end(libc::SIGTERM);
    let (listener, _) = listener(&site);
    let mut client = connect(&site);
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(&[7; 5000]).unwrap();
    assert_eq!(
        server.read_exact(&mut [0; 5000]).map(|()| 5000).unwrap(),
        5000
    );
    site.launch();
    let later = connect(&site);
    let (accepted, _) = listener.accept().unwrap();
    let of = |cookie: u64| {
        let port = PORT.to_string();
        let rows = rows(&site, &["--port", &port]);
        rows.into_iter().find(|row| row.cookie == cookie)
    };
    let row = of(cookie(&server)).expect("it was there before");
    assert!(row.earlier && !row.opened_here, "{row:?}");
    assert_eq!(
        (row.state.as_str(), row.bytes_received),
        ("established", 5000)
    );
    let truth = info(&server);
    assert_eq!(row.segments_in, truth.segs_in);
    // It goes on being told as its socket lives it.
    client.write_all(&[7; 3000]).unwrap();
    server.read_exact(&mut [0; 3000]).unwrap();
    assert_eq!(of(cookie(&server)).unwrap().bytes_received, 8000);
    let new = of(cookie(&accepted)).expect("it came after");
    assert!(!new.earlier, "{new:?}");
    let number = cookie(&server);
    drop((client, server));
    let started = Instant::now();
    while of(number).is_some_and(|row| row.state == "established") {
        assert!(started.elapsed() < DEADLINE);
        std::thread::sleep(Duration::from_millis(50));
    }
    drop((later, accepted));
}
