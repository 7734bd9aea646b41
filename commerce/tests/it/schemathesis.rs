//! Schemathesis against the real executable: does every answer conform to the OpenAPI document,
//! also over sequences of requests that use what earlier ones returned?

use std::process::Command;

use commerce::store::sql::Backend;

use crate::harness::{Database, Process};

#[test]
fn every_answer_conforms_to_the_openapi_document() {
    let environment = xtask::python::venv("schemathesis", &["schemathesis==4.32.5"]).unwrap();
    let database = Database::empty(Backend::Sqlite);
    let process = Process::start(&database, &["--hold-seconds", "5"]);
    let url = format!("http://{}/openapi.json", process.api.address());
    let run = Command::new(environment.join("bin/schemathesis"))
        .args(["run", &url])
        .args(["--phases", "examples,coverage,fuzzing,stateful"])
        // Conformance of answers, and nothing that ends in a 5xx. What is refused and what is
        // taken beyond the schema (a missing body, an unknown header) is the service's choice.
        .args(["--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"])
        .args(["--max-examples", "12", "--seed", "1", "--generation-deterministic", "--no-color"])
        .args(["--request-timeout", "30"])
        .current_dir(database.directory())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&run.stderr)
    );
    assert!(
        said.contains("Stateful"),
        "the stateful phase did not run:\n{said}"
    );
    process.terminate();
    assert!(process.wait().success());
    database.assert_audit_clean();
}
