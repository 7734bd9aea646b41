//! Through the real gateway: groups are watched, and the page arrives.

use std::process::{Child, Command, Stdio};

use reqwest::StatusCode;
use serde_json::json;
use tokio::net::TcpStream;

use commerce::store::sql::Backend;

use crate::groups::{CAMPAIGN, joined, pay, ticket, told, watch, with_campaign};
use crate::harness::{Api, eventually};

/// The gateway, killed on drop.
struct Gateway {
    child: Child,
    address: String,
    _directory: tempfile::TempDir,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // Fails when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Gateway {
    async fn start(service: &str) -> Self {
        let binary = xtask::host::target_directory().join("debug/edgemeter");
        // A test of the whole workspace has built it; one of this package alone has not.
        if !binary.exists() {
            let mut cargo = xtask::host::cargo();
            xtask::host::run(cargo.args(["build", "--locked", "--package", "edgemeter"])).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let address = {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap().to_string()
        };
        let configuration = format!(
            "[gateway]\nstate_dir = \"{}\"\ngrace_seconds = 1\n\n\
             [admin]\nlisten = \"127.0.0.1:0\"\n\n\
             [[listeners]]\nname = \"shop\"\naddress = \"{address}\"\n\n\
             [[upstreams]]\nname = \"commerce\"\npeers = [\"{service}\"]\n\n\
             [[routes]]\nname = \"all\"\npath = {{ prefix = \"/\" }}\nupstream = \"commerce\"\n",
            directory.path().join("state").display()
        );
        let path = directory.path().join("edgemeter.toml");
        std::fs::write(&path, configuration).unwrap();
        let child = Command::new(&binary)
            .args(["run", "--config"])
            .arg(&path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the gateway listens", async || {
            TcpStream::connect(&address).await.ok().map(drop)
        })
        .await;
        Self {
            child,
            address,
            _directory: directory,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_watched_through_the_gateway() {
    let (service, _campaign) = with_campaign(Backend::Sqlite, CAMPAIGN).await;
    let gateway = Gateway::start(service.api.address()).await;
    let api = Api::new(&gateway.address);
    let (group, order) = joined(&api, "one", "a", 3).await;
    // Many times over: whether the service's 101 or the client's empty body is first at the
    // gateway is a matter of luck.
    for _ in 0..40 {
        let ticket = ticket(&api, &group).await;
        let mut socket = watch(&gateway.address, &group, &ticket, None)
            .await
            .unwrap();
        assert_eq!(told(&mut socket).await["type"], "snapshot");
    }
    let last = ticket(&api, &group).await;
    let mut socket = watch(&gateway.address, &group, &last, None).await.unwrap();
    assert_eq!(told(&mut socket).await["places_left"], 2);
    joined(&api, "two", "a", 3).await;
    assert_eq!(told(&mut socket).await["places_left"], json!(1));
    assert_eq!(pay(&api, "one", &order).await.status(), StatusCode::OK);
    assert_eq!(told(&mut socket).await["group"]["paid"], 1);
    drop(socket);
    drop(gateway);
    service.stop_and_audit().await;
}
