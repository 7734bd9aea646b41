//! Campaigns: changed while serving, refused with a reason, decided and rolled back.

use std::time::Duration;

use commerce::store::sql::Backend;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Database, InProcess, eventually, product};

pub fn campaign(off: u16, salt: &str) -> String {
    format!(
        r#"
        [[discounts]]
        id = "sale"
        percent_off_basis_points = {off}

        [[discounts]]
        id = "test"
        percent_off_basis_points = 5000
        when = {{ variant = {{ experiment = "badge", variant = "treatment" }} }}

        [[experiments]]
        name = "badge"
        salt = "{salt}"
        variants = [
            {{ name = "control", weight_basis_points = 5000 }},
            {{ name = "treatment", weight_basis_points = 5000 }},
        ]
        "#
    )
}

pub struct Shop {
    pub service: InProcess,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Shop {
    pub async fn open(on: Backend, text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("campaign.toml");
        std::fs::write(&path, text).unwrap();
        let file = path.clone();
        let service = InProcess::with(on, &[product("a", 10_000)], |config| {
            config.campaigns.file = Some(file);
            config.campaigns.assess_every = Duration::from_millis(200);
        })
        .await;
        Self {
            service,
            path,
            _directory: directory,
        }
    }

    fn write(&self, text: &str) {
        // Whole or not at all, as an operator's tool would.
        let new = self.path.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &self.path).unwrap();
    }

    async fn revision(&self) -> u64 {
        self.service.api.metric("commerce_campaign_revision").await
    }

    async fn total(&self, key: &str, variant: &str) -> i64 {
        let response = self
            .service
            .api
            .request(Method::POST, "/api/v1/orders")
            .header("idempotency-key", key)
            .header("x-edgemeter-unit", key)
            .header("x-edgemeter-variant", format!("badge={variant}"))
            .json(&json!({ "lines": [{ "sku": "a", "quantity": 1 }] }))
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), StatusCode::CREATED);
        let order: Value = response.json().await.unwrap();
        order["total"]["minor"].as_i64().unwrap()
    }

    pub async fn experiment(&self) -> Value {
        let all = self.service.api.get_json("/api/v1/experiments").await;
        all["experiments"][0].clone()
    }
}

/// Writes what an experiment would have seen: `converted` of 1,000 in each variant.
fn observe(database: &Database, converted: [u32; 2]) {
    for (variant, converted) in ["control", "treatment"].into_iter().zip(converted) {
        let units = |count: u32| {
            format!(
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
            )
        };
        database.execute(&format!(
            "{} INSERT INTO exposure SELECT 'badge', 's1', '{variant}-' || i, '{variant}', 1 FROM n",
            units(1_000)
        ));
        database.execute(&format!(
            "{} INSERT INTO outcome SELECT '{variant}-' || i, '{variant}-' || i, 100, 2 FROM n",
            units(converted)
        ));
    }
}

crate::on_both_stores!(
    a_changed_file_is_in_force_without_a_restart_and_a_faulty_one_is_not,
    harm_is_rolled_back_to_the_last_good_revision_for_good,
);

async fn a_changed_file_is_in_force_without_a_restart_and_a_faulty_one_is_not(on: Backend) {
    let shop = Shop::open(on, &campaign(1_000, "s1")).await;
    assert_eq!(shop.total("k1", "control").await, 1_800); // 1999 − 199
    // A day has time for more than three changes; here they take seconds.
    for (n, off) in [2_000, 3_000, 4_000].into_iter().enumerate() {
        shop.write(&campaign(off, "s1"));
        let wanted = u64::try_from(n).unwrap() + 2;
        eventually("the change is in force", async || {
            (shop.revision().await == wanted).then_some(())
        })
        .await;
    }
    assert_eq!(shop.total("k2", "control").await, 1_200); // 1999 − 799
    shop.write("[[discounts]]\nid = \"x\"\n");
    eventually("the mistake is counted", async || {
        let rejections = shop
            .service
            .api
            .metric("commerce_campaign_rejections_total");
        (rejections.await == 1).then_some(())
    })
    .await;
    assert_eq!(
        shop.total("k3", "control").await,
        1_200,
        "what was in force stays"
    );
    shop.service.stop_and_audit().await;
}

async fn harm_is_rolled_back_to_the_last_good_revision_for_good(on: Backend) {
    let shop = Shop::open(on, &campaign(1_000, "s1")).await;
    let api = &shop.service.api;
    assert_eq!(shop.total("k1", "treatment").await, 1_000); // 1999 − 999
    eventually("the exposure is counted", async || {
        let units =
            api.metric("commerce_experiment_units{experiment=\"badge\",variant=\"treatment\"}");
        (units.await == 1).then_some(())
    })
    .await;
    observe(&shop.service.database, [300, 150]);
    eventually("the campaign is rolled back", async || {
        (api.metric("commerce_campaign_rollbacks_total").await == 1).then_some(())
    })
    .await;
    // There was no good one before: nothing is in force.
    eventually("the pointer is followed", async || {
        (shop.revision().await == 0).then_some(())
    })
    .await;
    assert_eq!(shop.total("k2", "treatment").await, 1_999);
    // The same text does not come back, and a changed one with the same experiment gives
    // everybody the control.
    shop.write(&campaign(2_000, "s1"));
    eventually("the changed file is in force", async || {
        (shop.revision().await == 2).then_some(())
    })
    .await;
    assert_eq!(shop.experiment().await["verdict"], "rolled_back");
    assert_eq!(shop.total("k3", "treatment").await, 1_600); // 1999 − 399, no test
    shop.write(&campaign(1_000, "s1"));
    eventually("the harmful text is refused", async || {
        (api.metric("commerce_campaign_rejections_total").await == 1).then_some(())
    })
    .await;
    assert_eq!(shop.revision().await, 2);
    shop.service.stop_and_audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_deals_its_visitor_once_and_logs_it_once() {
    let shop = Shop::open(Backend::Sqlite, &campaign(1_000, "s1")).await;
    let api = &shop.service.api;
    let first = api.get("/products/a").await;
    let cookie = first.headers()["set-cookie"].to_str().unwrap();
    let cookie = cookie.split(';').next().unwrap().to_owned();
    for _ in 0..3 {
        let again = api
            .request(Method::GET, "/products/a")
            .header("cookie", &cookie)
            .send()
            .await
            .unwrap();
        assert!(again.headers().get("set-cookie").is_none());
    }
    eventually("one customer is counted", async || {
        let seen = shop.experiment().await;
        let units = |at: usize| seen["variants"][at]["units"].as_u64().unwrap();
        (units(0) + units(1) == 1).then_some(())
    })
    .await;
    shop.service.stop_and_audit().await;
}
