//! Lines to paste: what `serve` and `up` print when they are ready.

use std::path::Path;

/// A curl line and five lines of Python that work when pasted, and where a browser finds the
/// dashboard. The key is read from `client.toml` rather than printed: what is on a screen ends up in logs. `http`: the API's URL; `ca`: whom to
/// trust where HTTPS shows a certificate of the cluster's own.
pub fn paste_lines(http: &str, model: &str, config: &Path, ca: Option<&Path>) -> String {
    let config = config.display().to_string();
    let body = serde_json::json!({
        "model": model,
        "messages": [{ "role": "user", "content": "Why is the sky blue?" }],
        "max_tokens": 128,
    })
    .to_string();
    let (shell_config, shell_body) = (shell_quote(&config), shell_quote(&body));
    let (python_config, python_body) = (python_quote(&config), python_quote(&body));
    let ca = ca.map(|ca| ca.display().to_string());
    let curl_ca = ca.as_deref().map(|ca| format!(" --cacert {}", shell_quote(ca)));
    let python_ca = ca.as_deref().map(|ca| {
        format!(", context=__import__('ssl').create_default_context(cafile={})", python_quote(ca))
    });
    let (curl_ca, python_ca) = (curl_ca.unwrap_or_default(), python_ca.unwrap_or_default());
    format!(
        "Ask it with curl:\n\n\
curl -sS{curl_ca} {http}/v1/chat/completions -H \"Authorization: Bearer $(sed -n 's/^api_key *= *\"\\(.*\\)\"/\\1/p' {shell_config})\" -H 'Content-Type: application/json' -d {shell_body}\n\n\
or with Python:\n\n\
import json, re, urllib.request\n\
key = re.search(r'^api_key *= *\"(.*)\"', open({python_config}).read(), re.M).group(1)\n\
headers = {{'Authorization': 'Bearer ' + key, 'Content-Type': 'application/json'}}\n\
request = urllib.request.Request('{http}/v1/chat/completions', {python_body}.encode(), headers)\n\
print(json.load(urllib.request.urlopen(request{python_ca}))['choices'][0]['message']['content'])\n\n\
or open {http} in a browser, where the pipeline is to be seen and to be talked to; it asks for the api_key in {config}\n"
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
        let (url, config) = ("http://127.0.0.1:8123", Path::new("/a b/client.toml"));
        let text = paste_lines(url, "it's", config, None);
        assert!(text.contains("http://127.0.0.1:8123/v1/chat/completions"), "{text}");
        assert!(!text.contains("cacert") && !text.contains("cafile"), "{text}");
        assert!(text.contains(r#""model":"it'\''s""#), "{text}");
        assert!(text.contains(r#""model":"it\'s""#), "{text}");
        assert!(text.contains("'/a b/client.toml'"), "{text}");
        let page = "or open http://127.0.0.1:8123 in a browser";
        assert!(text.contains(page) && text.contains("api_key in /a b/client.toml"), "{text}");
        let own = paste_lines("https://h:1", "m", config, Some(Path::new("/a b/ca.pem")));
        assert!(own.contains("--cacert '/a b/ca.pem' https://h:1/v1"), "{own}");
        assert!(own.contains("cafile='/a b/ca.pem'"), "{own}");
    }
}
