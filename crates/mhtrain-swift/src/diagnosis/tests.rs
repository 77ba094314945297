use super::*;

fn read(text: &str) -> Diagnosis {
    diagnose(text.as_bytes(), ExitFacts::default())
}

#[test]
fn every_known_wording_is_sorted_under_its_cause() {
    let table = include_str!("../../tests/fixtures/wordings.txt");
    let mut wrong = Vec::new();
    let mut count = 0;
    for row in table.lines().filter(|row| !row.starts_with('#')) {
        let (kind, line) = row.split_once('\t').unwrap();
        let kind: Kind = serde_json::from_value(kind.into()).unwrap();
        let found = diagnose(line.as_bytes(), ExitFacts { code: Some(1), ..ExitFacts::default() });
        count += 1;
        if found.kind != kind {
            wrong.push(format!("{kind:?} found as {:?}: {line}", found.kind));
        }
    }
    assert!(count > 200, "only {count} wordings were read");
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
}
