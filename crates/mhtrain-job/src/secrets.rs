//! Which names and values are secrets?
//!
//! The list is published in `docs/job.md`. A job file, the command line, logs and receipts never hold a secret;
//! a job names the environment variables that carry one.

use std::collections::BTreeMap;
use std::fmt;

/// A word that makes a name secret wherever it stands: `swanlab_secret`, `SMTP_PASSWORD`, `swanlab_webhook_url`.
pub const WORDS: [&str; 9] = [
    "secret",
    "secrets",
    "password",
    "passwd",
    "passphrase",
    "apikey",
    "credential",
    "credentials",
    "webhook",
];

/// Two words in a row that make a name secret: `WANDB_API_KEY`, `AWS_ACCESS_KEY_ID`.
pub const PAIRS: [(&str, &str); 10] = [
    ("api", "key"),
    ("access", "key"),
    ("auth", "key"),
    ("private", "key"),
    ("signing", "key"),
    ("encryption", "key"),
    ("api", "tokens"),
    ("auth", "tokens"),
    ("access", "tokens"),
    ("bearer", "token"),
];

/// Last words that make a name secret when it is written in capitals, as environment variables are: `DB_PWD`.
pub const LAST_WORDS_IN_CAPITALS: [&str; 5] = ["KEY", "PASS", "PWD", "AUTH", "COOKIE"];

/// Words before a last `token` that name a piece of text and no key: `pad_token`, `image_token`.
pub const TEXT_TOKENS: [&str; 26] = [
    "pad",
    "padding",
    "eos",
    "bos",
    "unk",
    "sep",
    "cls",
    "mask",
    "stop",
    "start",
    "end",
    "special",
    "new",
    "next",
    "image",
    "video",
    "audio",
    "vision",
    "think",
    "response",
    "loss",
    "per",
    "max",
    "min",
    "extra",
    "placeholder",
];

/// Last words that say that a name is about a place, not the secret itself: `HF_TOKEN_PATH`.
pub const PLACES: [&str; 4] = ["file", "path", "dir", "name"];

/// Beginnings of keys that well-known services give out. A value that begins so is a secret under any name.
pub const VALUE_PREFIXES: [&str; 9] =
    ["hf_", "sk-", "ghp_", "gho_", "ghs_", "github_pat_", "glpat-", "xoxb-", "AKIA"];

/// Shortest rest behind a prefix that makes a value a key, so that `hf_cache` is none.
const KEY_CHARACTERS_MIN: usize = 16;

/// Returns whether a parameter or variable of this name carries a secret.
///
/// Spelling does not matter: `--swanlab-token`, `swanlab_token` and `SWANLAB_TOKEN` are one name.
pub fn is_secret_name(name: &str) -> bool {
    let in_capitals = !name.chars().any(char::is_lowercase);
    let words = words(name);
    let Some((last, before)) = words.split_last() else { return false };
    if PLACES.contains(&last.as_str()) {
        return false;
    }
    // Google's libraries read a path from this variable, and its name does not show it.
    if name.eq_ignore_ascii_case("GOOGLE_APPLICATION_CREDENTIALS") {
        return false;
    }
    words.iter().any(|word| WORDS.contains(&word.as_str()))
        || words.windows(2).any(|two| PAIRS.iter().any(|(a, b)| two[0] == *a && two[1] == *b))
        || (last == "token" && !before.last().is_some_and(|word| TEXT_TOKENS.contains(&word.as_str())))
        || (in_capitals
            && !before.is_empty()
            && LAST_WORDS_IN_CAPITALS.iter().any(|word| word.eq_ignore_ascii_case(last)))
}

/// Returns whether a value is a secret under any name: a URL with user and password, or a well-known form of key.
pub fn is_secret_value(value: &str) -> bool {
    has_password_in_url(value) || is_known_key(value)
}

fn is_known_key(value: &str) -> bool {
    VALUE_PREFIXES.iter().any(|prefix| {
        // Keys of the first kind hold `-` and `_`; the others are letters and digits, which file names seldom are.
        let inside = if prefix.ends_with('-') || *prefix == "github_pat_" { "-_" } else { "" };
        value.strip_prefix(prefix).is_some_and(|rest| {
            rest.len() >= KEY_CHARACTERS_MIN
                && rest.chars().all(|c| c.is_ascii_alphanumeric() || inside.contains(c))
                && rest.chars().any(|c| c.is_ascii_digit() || c.is_ascii_uppercase())
        })
    })
}

fn has_password_in_url(value: &str) -> bool {
    value.split("://").skip(1).any(|rest| {
        let authority = rest.split(['/', '?', '#', ' ', '"']).next().unwrap_or(rest);
        authority
            .rsplit_once('@')
            .and_then(|(user_info, _)| user_info.split_once(':'))
            .is_some_and(|(_, password)| !password.is_empty())
    })
}

/// Returns the name of a variable that a value is nothing but a reference to: `$NAME` or `${NAME}`.
pub fn shell_reference(value: &str) -> Option<&str> {
    let name = value.trim().strip_prefix('$')?;
    let name = name.strip_prefix('{').and_then(|inner| inner.strip_suffix('}')).unwrap_or(name);
    is_variable_name(name).then_some(name)
}

/// Returns whether an environment variable can have this name (POSIX, Base Definitions 8.1, lower case allowed).
pub fn is_variable_name(name: &str) -> bool {
    !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Returns the environment variable that should carry what a secret parameter carried.
///
/// SwanLab and Weights & Biases read their key from the variable named here; ms-swift's help for
/// `--swanlab_token` names the same one. Elsewhere it is the parameter's own name in capitals.
pub fn variable_for(name: &str) -> String {
    let upper = words(name).join("_").to_uppercase();
    match upper.as_str() {
        "SWANLAB_TOKEN" => "SWANLAB_API_KEY".to_owned(),
        "HUB_TOKEN" => "HF_TOKEN".to_owned(),
        "" => "SECRET".to_owned(),
        _ if upper.starts_with(|c: char| c.is_ascii_digit()) => format!("SECRET_{upper}"),
        _ => upper,
    }
}

/// Returns the words of a name in lower case: cut at anything but letters and digits, and inside `apiKey`.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut after_lower = false;
    for c in name.chars() {
        if !c.is_ascii_alphanumeric() || (c.is_ascii_uppercase() && after_lower) {
            words.push(String::new());
        }
        after_lower = c.is_ascii_lowercase();
        if c.is_ascii_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.push(c.to_ascii_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// An environment for `Debug`: names are shown, values are not.
pub struct Redacted<'a>(pub &'a BTreeMap<String, String>);

impl fmt::Debug for Redacted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.keys().map(|name| (name, "…"))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_keys_tokens_and_passwords_are_secret() {
        for name in [
            "swanlab_token",
            "--swanlab-token",
            "SWANLAB_TOKEN",
            "SWANLAB_API_KEY",
            "swanlab_secret",
            "swanlab_webhook_url",
            "hub_token",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "apiKey",
            "MODELSCOPE_API_TOKEN",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "password",
            "smtp_password",
            "DB_PASSWD",
            "DB_PWD",
            "token",
            "TOKEN",
            "access_token",
            "OPENAI_KEY",
            "ssh_private_key",
            "swanlabToken",
            "MY_CREDENTIALS",
            "api-key",
        ] {
            assert!(is_secret_name(name), "{name}");
        }
    }

    #[test]
    fn names_about_text_and_places_are_not_secret() {
        for name in [
            "tokens_per_batch",
            "max_new_tokens",
            "pad_token",
            "eos_token",
            "num_tokens",
            "tokenizer",
            "token_acc",
            "tokenizer_path",
            "loss_scale",
            "HF_TOKEN_PATH",
            "TOKENIZERS_PARALLELISM",
            "PWD",
            "OLDPWD",
            "PATH",
            "KEY",
            "messages_key",
            "key",
            "new_special_tokens",
            "author",
            "secretary",
            "",
            "---",
            "HF_HOME",
            "image_token",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "keep_in_memory",
            "monkey",
            "single_pass",
            "HF_HUB_OFFLINE",
        ] {
            assert!(!is_secret_name(name), "{name}");
        }
    }

    #[test]
    fn a_url_with_a_password_and_a_well_known_key_are_secret_values() {
        assert!(is_secret_value("http://alice:hunter2@proxy.example:3128"));
        assert!(is_secret_value("postgres://u:p@h/db?x=1"));
        assert!(is_secret_value(&format!("hf_{}", "Ab3".repeat(10))));
        assert!(is_secret_value(&format!("sk-{}", "Ab3".repeat(10))));
    }

    #[test]
    fn plain_urls_and_words_are_no_secret_values() {
        for value in [
            "http://proxy.example:3128",
            "http://alice@proxy.example",
            "https://h/a:b@c",
            "hf_cache",
            "/data/hf_Qwen2",
            "hf_models_downloaded_here",
            "hf_Qwen2.5-7B-Instruct-long",
            "sk-learn",
            "",
            "$TOKEN",
            "a:b@c",
            "http://u:@h",
        ] {
            assert!(!is_secret_value(value), "{value}");
        }
    }

    #[test]
    fn a_whole_reference_is_seen_and_a_part_is_not() {
        assert_eq!(shell_reference("$SWANLAB_TOKEN"), Some("SWANLAB_TOKEN"));
        assert_eq!(shell_reference("${A_1}"), Some("A_1"));
        for value in ["$", "${}", "$1", "$A/b", "a$B", "", "${A", "$A $B"] {
            assert_eq!(shell_reference(value), None, "{value}");
        }
    }

    #[test]
    fn the_variable_for_a_secret_is_a_name_that_a_variable_can_have() {
        assert_eq!(variable_for("swanlab_token"), "SWANLAB_API_KEY");
        assert_eq!(variable_for("--swanlab-secret"), "SWANLAB_SECRET");
        assert_eq!(variable_for("apiKey"), "API_KEY");
        for name in ["", "9token", "ü_token", "a b token"] {
            assert!(is_variable_name(&variable_for(name)), "{name}");
        }
    }

    #[test]
    fn debug_output_of_an_environment_hides_values() {
        let env = BTreeMap::from([("NAME".to_owned(), "value-in-here".to_owned())]);
        let shown = format!("{:?}", Redacted(&env));
        assert!(shown.contains("NAME") && !shown.contains("value-in-here"), "{shown}");
    }
}
