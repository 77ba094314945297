#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mhtrain_readers::companion_report(bytes));
