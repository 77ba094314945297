use super::*;

fn read(text: &str) -> Diagnosis {
    diagnose(text.as_bytes(), ExitFacts::default())
}

#[test]
fn smoke() {
    assert_eq!(read("RuntimeError: CUDA error: out of memory").kind, Kind::DeviceOom);
}
