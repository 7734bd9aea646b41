//! What a scrape shows.

use super::*;

#[test]
fn the_list_of_names_is_exactly_what_a_scrape_describes() {
    let metrics = Metrics::new();
    // A family is described once it has a member.
    metrics.request_began();
    metrics.request_ended("/livez", "GET", "2xx", Duration::ZERO);
    metrics.order_created(1, "CNY".to_owned(), 1);
    growth::tests::give_every_family_a_member(&metrics);
    let text = metrics.encode().unwrap();
    let names: Vec<&str> = NAMES.iter().chain(growth::NAMES).copied().collect();
    let described: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, kind)| {
            if kind == "counter" {
                format!("{name}_total")
            } else {
                name.to_owned()
            }
        })
        .collect();
    assert_eq!(described, names);
    assert!(names.iter().all(|name| name.starts_with("commerce_")));
    assert_eq!(
        text.lines()
            .filter(|line| line.starts_with("# HELP "))
            .count(),
        names.len()
    );
}

#[test]
fn an_order_moves_count_revenue_and_units() {
    let metrics = Metrics::new();
    metrics.order_created(5998, "CNY".to_owned(), 4);
    metrics.order_created(2, "CNY".to_owned(), 1);
    let text = metrics.encode().unwrap();
    for line in [
        "commerce_orders_created_total 2",
        "commerce_revenue_minor_units_total{currency=\"CNY\"} 6000",
        "commerce_stock_units_deducted_total 5",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} not in\n{text}"
        );
    }
}
