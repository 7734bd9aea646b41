//! The guards, on the real kernel. Without root these fail: a skipped test proves nothing.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::*;
use crate::host::Tool;

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(NAMES).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Listens in one namespace, connects from another, and returns what came through.
fn talk(server: &Namespace, client: &Namespace, address: IpAddr) -> Result<String> {
    let listener = server.run(|| TcpListener::bind(SocketAddr::new(address, 0)))??;
    let target = listener.local_addr()?;
    let mut sent = client.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(5)))??;
    sent.write_all(b"hello")?;
    drop(sent);
    let mut heard = String::new();
    listener.accept()?.0.read_to_string(&mut heard)?;
    Ok(heard)
}

#[test]
fn three_hosts_talk_over_both_cables_and_vanish() -> Result<()> {
    host::require_root("this test")?;
    host::need(&[Tool::IP, Tool::ETHTOOL])?;
    let prefix = Namespace::unique_prefix("em-test-hosts");
    let topology = Topology::three_hosts(&prefix)?;
    assert_eq!(
        names()
            .iter()
            .filter(|name| name.starts_with(&prefix))
            .count(),
        3
    );

    let to_client = GATEWAY_TO_CLIENT;
    let to_service = GATEWAY_TO_SERVICE;
    for address in [IpAddr::from(to_client.v4), to_client.v6.into()] {
        assert_eq!(talk(&topology.gateway, &topology.client, address)?, "hello");
    }
    for address in [IpAddr::from(to_service.far_v4), to_service.far_v6.into()] {
        assert_eq!(
            talk(&topology.service, &topology.gateway, address)?,
            "hello"
        );
    }
    // The proxy is the only way: nothing is forwarded.
    let past = SocketAddr::new(to_service.far_v4.into(), 9);
    let connected = topology
        .client
        .run(|| TcpStream::connect_timeout(&past, Duration::from_millis(200)))?;
    assert!(
        connected.is_err(),
        "the client reached the service past the gateway"
    );

    drop(topology);
    assert!(
        !names().iter().any(|name| name.starts_with(&prefix)),
        "names are left"
    );
    Ok(())
}

#[test]
fn a_command_runs_inside_with_our_mounts() -> Result<()> {
    host::require_root("this test")?;
    host::need(&[Tool::IP])?;
    host::mount_bpffs()?;
    let namespace = Namespace::create(&Namespace::unique_prefix("em-test-command"))?;
    let links = host::output(namespace.command("ip")?.args(["-o", "link"]))?;
    assert!(
        links.lines().all(|line| line.contains(": lo:")),
        "not inside: {links}"
    );
    let magic = host::output(
        namespace
            .command("stat")?
            .args(["-f", "-c", "%t", "/sys/fs/bpf"]),
    )?;
    assert_eq!(magic.trim(), "cafe4a11", "bpffs is hidden");
    Ok(())
}

#[test]
fn the_management_link_leads_to_the_gateway_and_goes_with_it() -> Result<()> {
    host::require_root("this test")?;
    host::need(&[Tool::IP, Tool::ETHTOOL])?;
    let mut topology = Topology::three_hosts(&Namespace::unique_prefix("em-test-mgmt"))?;
    topology.add_management_link()?;
    let address = SocketAddr::new(MANAGEMENT_GATEWAY.into(), 0);
    let listener = topology.gateway.run(|| TcpListener::bind(address))??;
    TcpStream::connect_timeout(&listener.local_addr()?, Duration::from_secs(5))?;
    drop(topology);
    assert!(!Path::new("/sys/class/net").join(MANAGEMENT_DEVICE).exists());
    Ok(())
}

#[test]
fn sweeping_removes_what_dead_runs_left_and_spares_the_living() -> Result<()> {
    host::require_root("this test")?;
    host::need(&[Tool::IP])?;
    let prefix = "em-test-sweep";
    let ours = Namespace::create(&Namespace::unique_prefix(prefix))?;
    // No process has this id: the kernel's largest is 4194304.
    let dead = Namespace::create(&format!("{prefix}-4194305-0"))?;
    let dead_name = dead.name().to_owned();
    // The owner died without dropping it.
    std::mem::forget(dead);
    Namespace::sweep(prefix)?;
    let left = names();
    assert!(left.iter().any(|name| name == ours.name()));
    assert!(!left.contains(&dead_name));
    Ok(())
}

#[test]
fn what_is_left_over_is_told_by_name() {
    let alive = |pid: &str| pid == "17";
    assert!(is_left_over("em-demo-gw", "em-demo", alive));
    assert!(is_left_over("em-it-18-0-gw", "em-it", alive));
    assert!(!is_left_over("em-it-17-0-gw", "em-it", alive));
    assert!(!is_left_over("em-italy-gw", "em-it", alive));
    assert!(!is_left_over("other", "em-it", alive));
}

#[test]
fn interface_names_fit_the_kernel() {
    assert!(check_interface_name("exactly15bytes_").is_ok());
    assert!(check_interface_name("exactly16bytes__").is_err());
    assert!(check_interface_name("").is_err());
}
