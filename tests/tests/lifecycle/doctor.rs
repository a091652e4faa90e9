//! `hull doctor` on a host that can run containers.

use hull_tests::hull::Hull;
use serde_json::Value;

#[test]
fn a_good_host_is_said_to_be_one() {
    let Some(hull) = Hull::new() else { return };
    let said = hull.cmd(["doctor"]).output();
    assert_eq!(said.code, 0, "{:?}", said.all());
    let report: Value =
        serde_json::from_str(&hull.cmd(["doctor", "--json"]).output().ok()).unwrap();
    assert_eq!(report["ready"], true);
    let findings = report["findings"].as_array().unwrap();
    assert!(!findings.is_empty());
    for finding in findings {
        assert_ne!(finding["health"], "broken", "{finding}");
    }
}
