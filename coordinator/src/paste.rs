//! Lines to paste: what `serve` and `up` print when they are ready.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// A curl line and five lines of Python that work when pasted. The key is read from `client.toml`
/// rather than printed: what is on a screen ends up in logs.
pub fn paste_lines(http: SocketAddr, model: &str, config: &Path) -> String {
    let mut reachable = http;
    if http.ip().is_unspecified() {
        reachable.set_ip(match http {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let config = config.display().to_string();
    let body = serde_json::json!({
        "model": model,
        "messages": [{ "role": "user", "content": "Why is the sky blue?" }],
        "max_tokens": 128,
    })
    .to_string();
    let (shell_config, shell_body) = (shell_quote(&config), shell_quote(&body));
    let (python_config, python_body) = (python_quote(&config), python_quote(&body));
    format!(
        "Ask it with curl:\n\n\
curl -sS http://{reachable}/v1/chat/completions -H \"Authorization: Bearer $(sed -n 's/^api_key *= *\"\\(.*\\)\"/\\1/p' {shell_config})\" -H 'Content-Type: application/json' -d {shell_body}\n\n\
or with Python:\n\n\
import json, re, urllib.request\n\
key = re.search(r'^api_key *= *\"(.*)\"', open({python_config}).read(), re.M).group(1)\n\
headers = {{'Authorization': 'Bearer ' + key, 'Content-Type': 'application/json'}}\n\
request = urllib.request.Request('http://{reachable}/v1/chat/completions', {python_body}.encode(), headers)\n\
print(json.load(urllib.request.urlopen(request))['choices'][0]['message']['content'])\n"
    )
}

fn shell_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn python_quote(text: &str) -> String {
    format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pasted_lines_are_quoted_and_reach_a_bound_address() {
        let any = "0.0.0.0:8123".parse().unwrap();
        let text = paste_lines(any, "it's", Path::new("/a b/client.toml"));
        assert!(text.contains("http://127.0.0.1:8123/v1/chat/completions"), "{text}");
        assert!(text.contains(r#""model":"it'\''s""#), "{text}");
        assert!(text.contains(r#""model":"it\'s""#), "{text}");
        assert!(text.contains("'/a b/client.toml'"), "{text}");
    }
}
