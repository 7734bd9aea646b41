//! Both servers live, die and leave nothing.

use super::*;

#[test]
fn postgres_answers_survives_a_crash_and_leaves_nothing() {
    let mut server = Postgres::start().unwrap();
    let url = server.create_database().unwrap();
    let name = url.rsplit('/').next().unwrap().to_owned();
    server
        .query(&name, "CREATE TABLE t (n int); INSERT INTO t VALUES (7)")
        .unwrap();
    server.kill().unwrap();
    assert!(server.query(&name, "SELECT 1").is_err());
    server.restart().unwrap();
    assert_eq!(server.query(&name, "SELECT n FROM t").unwrap().trim(), "7");
    let (directory, port) = (server.directory.clone(), server.port());
    drop(server);
    assert!(!directory.exists());
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
}

#[test]
fn redis_answers_and_forgets_at_a_crash() {
    let mut server = Redis::start().unwrap();
    server.command(&["set", "k", "v"]).unwrap();
    assert_eq!(server.command(&["get", "k"]).unwrap().trim(), "v");
    server.kill().unwrap();
    server.restart().unwrap();
    assert_eq!(server.command(&["get", "k"]).unwrap().trim(), "");
    let directory = server.directory.clone();
    drop(server);
    assert!(!directory.exists());
}
