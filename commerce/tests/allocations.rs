//! How many allocations one order costs the service, over HTTP, from the first byte to the
//! committed answer; and that the number stays within its budget.
//!
//! The client of this test is one thread that the count leaves out.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on should say where and stop"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use commerce::app::Service;
use commerce::config::Config;
use commerce::store::Target;

/// Allocations per order with one line, in the steady state. Raise it only with a reason.
const BUDGET: u64 = 110;
const ORDERS: u64 = 400;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static IS_CLIENT: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

fn count() {
    // A thread that ends has no locals left; it is none of the client's.
    if !IS_CLIENT.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` or `realloc` above, so from the system.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as for `dealloc`; the caller promises the size.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn place(connection: &mut TcpStream, n: u64) {
    let body = r#"{"lines":[{"sku":"1001","quantity":1}]}"#;
    let request = format!(
        "POST /api/v1/orders HTTP/1.1\r\nhost: x\r\nx-tenant: acme\r\ncontent-type: application/json\r\n\
         idempotency-key: k{n}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    // The body ends the JSON object; nothing of ours contains "}\n" or ends earlier with it.
    while !answer.ends_with(b"\"}") {
        let read = connection.read(&mut buffer).unwrap();
        assert!(read > 0, "{}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&buffer[..read]);
    }
    assert!(
        answer.starts_with(b"HTTP/1.1 201"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[test]
fn an_order_stays_within_its_budget_of_allocations() {
    IS_CLIENT.with(|client| client.set(true));
    let directory = tempfile::tempdir().unwrap();
    let config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        store: Target::Sqlite(directory.path().join("commerce.db")),
        gate_url: None,
        risk_url: None,
        provider_url: None,
        sink_ca: None,
        shared_secret: None,
        provider_check: Duration::from_secs(30),
        hold: Duration::from_secs(900),
        keep: commerce::command::forget::Keep {
            keys: Duration::from_secs(86_400),
            events: Duration::from_secs(86_400),
        },
        membership_sku: commerce::catalogue::Sku::parse("member-30d").unwrap(),
        campaigns: commerce::campaigns::Settings {
            file: None,
            assess_every: Duration::from_secs(3_600),
            good_after: Duration::from_secs(3_600),
        },
        issuer: "https://shop.test".to_owned(),
        audience: "shop".to_owned(),
        origins: Vec::new(),
        queue_capacity: NonZeroUsize::new(64).unwrap(),
        readers: NonZeroU32::new(1).unwrap(),
        seed: true,
        drain_announce: Duration::ZERO,
        drain_timeout: Duration::from_secs(10),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let service = runtime.block_on(Service::start(&config)).unwrap();
    let address = service.address();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = runtime.spawn(service.run(async {
        let _ = stopped.await;
    }));
    let mut connection = TcpStream::connect(address).unwrap();
    // Statements are prepared and buffers have their size.
    for n in 0..100 {
        place(&mut connection, n);
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for n in 100..100 + ORDERS {
        place(&mut connection, n);
    }
    let each = (ALLOCATIONS.load(Ordering::Relaxed) - before) / ORDERS;
    println!("{each} allocations per order, budget {BUDGET}");
    assert!(
        each <= BUDGET,
        "{each} allocations per order, budget {BUDGET}"
    );
    // A count of nothing would mean that nothing was counted.
    assert!(each >= 10, "{each}");
    drop(connection);
    stop.send(()).unwrap();
    runtime.block_on(running).unwrap().unwrap();
}
