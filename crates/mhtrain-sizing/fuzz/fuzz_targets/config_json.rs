//! Any bytes as a config.json: a shape or an error, and an estimate that is in order.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mhtrain_sizing::estimate_request::EstimateRequest;
use mhtrain_sizing::model::Model;
use serde_json::Value;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // The line interface first, then the same bytes as a config.
    if let Ok(request) = EstimateRequest::parse(text) {
        let _ = request.answer(None);
    }
    let Ok(config) = serde_json::from_str::<Value>(text) else { return };
    if let Ok(model) = Model::resolve("fuzz", Some(&config), None) {
        let line = serde_json::json!({"config_object": config, "micro_batch": 3, "max_length": 777, "attn_impl": "sdpa"});
        if let Ok(estimate) = EstimateRequest::parse(&line.to_string()).and_then(|request| request.answer(None)) {
            assert!(estimate.low_bytes <= estimate.device_peak_bytes);
            assert!(estimate.device_peak_bytes <= estimate.high_bytes);
        }
        let _ = model.parameters();
    }
});
