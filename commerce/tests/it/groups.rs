//! Group buys: places, payments, deadlines, and who watches.

use std::collections::HashSet;

use commerce::store::sql::Backend;
use futures_util::StreamExt as _;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};

use crate::harness::{Api, InProcess, eventually, product};

/// Groups of three for SKU `a` at 15.99, and of two for `quick`, which end after 2 seconds.
pub const CAMPAIGN: &str = r#"
[[groups]]
sku = "a"
size = 3
price_minor = 1599

[[groups]]
sku = "quick"
size = 2
price_minor = 1000
forming_seconds = 2

[[groups]]
sku = "brief"
size = 2
price_minor = 1000
hold_seconds = 1
"#;

/// A service with this campaign.
pub async fn with_campaign(on: Backend, campaign: &str) -> (InProcess, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("campaign.toml");
    std::fs::write(&path, campaign).unwrap();
    let products = [
        product("a", 100),
        product("quick", 100),
        product("brief", 100),
        product("member-30d", 100),
    ];
    let service = InProcess::with(on, &products, |config| {
        config.campaigns.file = Some(path);
    })
    .await;
    (service, directory)
}

async fn join(api: &Api, who: &str, sku: &str, size: u32, group: Option<&str>) -> Response {
    let mut body = json!({ "sku_id": sku, "group_size": size });
    if let Some(group) = group {
        body["group_id"] = group.into();
    }
    api.request(Method::POST, "/api/v1/group")
        .header("x-tenant", who)
        .header(
            "idempotency-key",
            format!("{who}-{}", group.unwrap_or("any")),
        )
        .json(&body)
        .send()
        .await
        .unwrap()
}

/// Joins, and gives the group's and the order's path.
pub async fn joined(api: &Api, who: &str, sku: &str, size: u32) -> (String, String) {
    let response = join(api, who, sku, size, None).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    let place: Value = response.json().await.unwrap();
    (
        place["group"]["id"].as_str().unwrap().to_owned(),
        format!("/api/v1/orders/{}", place["order"]["id"].as_str().unwrap()),
    )
}

pub async fn pay(api: &Api, who: &str, order: &str) -> Response {
    api.request(Method::POST, &format!("{order}/pay"))
        .header("x-tenant", who)
        .header("idempotency-key", format!("{who}-pays"))
        .json(&json!({}))
        .send()
        .await
        .unwrap()
}

async fn show(api: &Api, group: &str) -> Value {
    api.get_json(&format!("/api/v1/group/{group}")).await
}

crate::on_both_stores!(
    a_group_fills_at_its_price_and_succeeds_with_the_last_payment,
    more_join_at_once_than_there_are_places,
    a_group_that_does_not_fill_gives_everything_back,
    a_place_that_is_not_paid_is_free_again,
);

async fn a_group_fills_at_its_price_and_succeeds_with_the_last_payment(on: Backend) {
    let (service, _campaign) = with_campaign(on, CAMPAIGN).await;
    let api = &service.api;
    let offer = api.get_json("/api/v1/group?sku_id=a&group_size=3").await;
    assert_eq!(offer["unit_price"]["minor"], 1599);
    assert_eq!(offer["list_price"]["minor"], 1999);
    assert_eq!(offer["places_left"], 3);
    let none = api.get("/api/v1/group?sku_id=a&group_size=4").await;
    assert_eq!(none.status(), StatusCode::NOT_FOUND);

    let mut places = Vec::new();
    for who in ["one", "two", "three"] {
        places.push((who, joined(api, who, "a", 3).await));
    }
    let groups: HashSet<&String> = places.iter().map(|(_, (group, _))| group).collect();
    assert_eq!(groups.len(), 1, "all in the fullest group");
    let group = places[0].1.0.clone();
    let again = join(api, "one", "a", 3, Some(&group)).await;
    assert_eq!(again.status(), StatusCode::CONFLICT);
    let full = join(api, "four", "a", 3, Some(&group)).await;
    assert_eq!(full.status(), StatusCode::CONFLICT);
    let problem: Value = full.json().await.unwrap();
    assert_eq!(problem["type"], "urn:commerce:problem:group-full");
    // Reading changes nothing, and says that a new group would begin.
    let offer = api.get_json("/api/v1/group?sku_id=a&group_size=3").await;
    assert_eq!(
        (&offer["places_left"], &offer["groups"]),
        (&json!(3), &json!([]))
    );

    for (at, (who, (_, order))) in places.iter().enumerate() {
        assert_eq!(show(api, &group).await["state"], "forming");
        let paid = pay(api, who, order).await;
        assert_eq!(paid.status(), StatusCode::OK);
        let paid: Value = paid.json().await.unwrap();
        assert_eq!(
            (&paid["status"], &paid["total"]["minor"]),
            (&json!("paid"), &json!(1599))
        );
        assert_eq!(show(api, &group).await["paid"], at + 1);
    }
    assert_eq!(show(api, &group).await["state"], "succeeded");
    service.stop_and_audit().await;
}

async fn more_join_at_once_than_there_are_places(on: Backend) {
    let (service, _campaign) = with_campaign(on, CAMPAIGN).await;
    let (group, _) = joined(&service.api, "first", "a", 3).await;
    let mut tasks = JoinSet::new();
    for n in 0..24 {
        let (api, group) = (service.api.clone(), group.clone());
        tasks.spawn(async move {
            join(&api, &format!("m{n}"), "a", 3, Some(&group))
                .await
                .status()
        });
    }
    let statuses = tasks.join_all().await;
    let count = |status| statuses.iter().filter(|is| **is == status).count();
    assert_eq!(count(StatusCode::CREATED), 2, "{statuses:?}");
    assert_eq!(count(StatusCode::CONFLICT), 22, "{statuses:?}");
    let shown = show(&service.api, &group).await;
    assert_eq!((&shown["taken"], &shown["size"]), (&json!(3), &json!(3)));
    service.stop_and_audit().await;
}

async fn a_group_that_does_not_fill_gives_everything_back(on: Backend) {
    let (service, _campaign) = with_campaign(on, CAMPAIGN).await;
    let (group, order) = joined(&service.api, "one", "quick", 2).await;
    let paid = pay(&service.api, "one", &order).await;
    assert_eq!(paid.status(), StatusCode::OK);
    eventually("the group has failed", async || {
        (show(&service.api, &group).await["state"] == "failed").then_some(())
    })
    .await;
    let refunded = service
        .api
        .request(Method::GET, &order)
        .header("x-tenant", "one")
        .send()
        .await
        .unwrap();
    let refunded: Value = refunded.json().await.unwrap();
    assert_eq!(
        (&refunded["status"], &refunded["refunded"]["minor"]),
        (&json!("refunded"), &json!(1000))
    );
    let late = join(&service.api, "two", "quick", 2, Some(&group)).await;
    assert_eq!(late.status(), StatusCode::CONFLICT);
    let product = service.api.get_json("/api/v1/products/quick").await;
    assert_eq!(product["available"], 100);
    service.stop_and_audit().await;
}

async fn a_place_that_is_not_paid_is_free_again(on: Backend) {
    let (service, _campaign) = with_campaign(on, CAMPAIGN).await;
    let (group, order) = joined(&service.api, "one", "brief", 2).await;
    eventually("the place is free", async || {
        (show(&service.api, &group).await["taken"] == 0).then_some(())
    })
    .await;
    // Too late for the order, so for the place.
    let late = pay(&service.api, "one", &order).await;
    assert_eq!(late.status(), StatusCode::CONFLICT);
    // And they may come again.
    let again = join(&service.api, "one", "brief", 2, Some(&group)).await;
    assert_eq!(again.status(), StatusCode::CREATED);
    service.stop_and_audit().await;
}

pub async fn ticket(api: &Api, group: &str) -> String {
    let path = format!("/api/v1/group/{group}/ticket");
    let response = api.request(Method::POST, &path).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    let body: Value = response.json().await.unwrap();
    body["ticket"].as_str().unwrap().to_owned()
}

pub type Socket =
    tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

pub async fn watch(
    address: &str,
    group: &str,
    ticket: &str,
    origin: Option<&str>,
) -> Result<Socket, SocketError> {
    let url = format!("ws://{address}/api/v1/group/{group}/watch?ticket={ticket}");
    let mut request = url.into_client_request()?;
    if let Some(origin) = origin {
        request
            .headers_mut()
            .insert("origin", origin.parse().unwrap());
    }
    Ok(connect_async(request).await?.0)
}

/// The next thing a watcher is told; pings are answered by the client on its own.
pub async fn told(socket: &mut Socket) -> Value {
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Why the connection ends; pings and hints before it are passed over.
async fn closed(socket: &mut Socket) -> CloseCode {
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Close(frame) => return frame.unwrap().code,
            Message::Text(_) | Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn refused(outcome: Result<Socket, SocketError>) -> u16 {
    match outcome {
        Err(SocketError::Http(response)) => response.status().as_u16(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("connected"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_get_a_snapshot_then_rising_versions_until_the_end() {
    let (service, _campaign) = with_campaign(Backend::Sqlite, CAMPAIGN).await;
    let api = &service.api;
    let (group, first) = joined(api, "one", "a", 3).await;
    let mut watching = Vec::new();
    for _ in 0..3 {
        let ticket = ticket(api, &group).await;
        watching.push(watch(api.address(), &group, &ticket, None).await.unwrap());
    }
    for socket in &mut watching {
        let snapshot = told(socket).await;
        assert_eq!(
            (&snapshot["type"], &snapshot["places_left"]),
            (&json!("snapshot"), &json!(2))
        );
    }
    let mut orders = vec![("one", first)];
    for who in ["two", "three"] {
        orders.push((who, joined(api, who, "a", 3).await.1));
    }
    for (who, order) in &orders {
        assert_eq!(pay(api, who, order).await.status(), StatusCode::OK);
    }
    for socket in &mut watching {
        let mut version = 0;
        loop {
            let hint = told(socket).await;
            assert_eq!(hint["type"], "hint");
            assert!(hint["version"].as_i64().unwrap() > version, "versions rise");
            version = hint["version"].as_i64().unwrap();
            if hint["state"] == "succeeded" {
                break;
            }
        }
        assert_eq!(closed(socket).await, CloseCode::Normal);
    }
    drop(watching);
    eventually("no watcher is left over", async || {
        let left = api.metric("commerce_tasks{kind=\"watcher\"}").await;
        let readers = api.metric("commerce_tasks{kind=\"group_reader\"}").await;
        (left == 0 && readers == 0).then_some(())
    })
    .await;
    service.stop_and_audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_admits_once_and_only_from_our_own_pages() {
    let (service, _campaign) = with_campaign(Backend::Sqlite, CAMPAIGN).await;
    let api = &service.api;
    let (group, _) = joined(api, "one", "a", 3).await;
    assert_eq!(
        refused(watch(api.address(), &group, "forged", None).await),
        403
    );
    let good = ticket(api, &group).await;
    let elsewhere = Some("https://evil.example");
    assert_eq!(
        refused(watch(api.address(), &group, &good, elsewhere).await),
        403
    );
    // The refusal did not use it up.
    let own = format!("http://{}", api.address());
    let mut socket = watch(api.address(), &group, &good, Some(&own))
        .await
        .unwrap();
    assert_eq!(told(&mut socket).await["type"], "snapshot");
    assert_eq!(
        refused(watch(api.address(), &group, &good, None).await),
        403
    );
    let unknown = "00000000-0000-7000-8000-000000000000";
    let path = format!("/api/v1/group/{unknown}/ticket");
    let response = api.request(Method::POST, &path).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    drop(socket);
    service.stop_and_audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_tells_watchers_to_come_again() {
    let (service, _campaign) = with_campaign(Backend::Sqlite, CAMPAIGN).await;
    let (group, _) = joined(&service.api, "one", "a", 3).await;
    let ticket = ticket(&service.api, &group).await;
    let mut socket = watch(service.api.address(), &group, &ticket, None)
        .await
        .unwrap();
    told(&mut socket).await;
    let stopped = tokio::spawn(service.stop_and_audit());
    assert_eq!(closed(&mut socket).await, CloseCode::Restart);
    stopped.await.unwrap();
}
