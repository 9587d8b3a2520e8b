//! What lies in `deploy/` and what the runbook says is true of the programs: every command line parses,
//! every variable is known, every metric exists, every file is well-formed. The chart is rendered
//! as Helm would.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use gtmpl::{Context, FuncError, Template, Value};
use millrace_coordinator::cli as coordinator;
use millrace_node::cli as node;
use millrace_shared::flags::extend;
use yaml_rust2::{Yaml, YamlLoader};

use crate::{Cli, PROGRAM};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn yaml(name: &str, text: &str) -> Vec<Yaml> {
    YamlLoader::load_from_str(text).unwrap_or_else(|e| panic!("{name}: {e}\n{text}"))
}

/// The programs, with everything that `main` adds.
fn programs() -> HashMap<&'static str, Command> {
    HashMap::from([
        ("millrace", extend(Cli::command(), PROGRAM)),
        ("millrace-coordinator", extend(coordinator::Cli::command(), coordinator::PROGRAM)),
        ("millrace-node", extend(node::Cli::command(), node::PROGRAM)),
    ])
}

/// Whether the words are a command line of one of the programs, and parse.
#[track_caller]
fn parses(place: &str, words: &[String]) -> bool {
    let programs = programs();
    let Some(command) = words.first().and_then(|w| programs.get(w.rsplit('/').next().unwrap()))
    else {
        return false;
    };
    if words.iter().any(|w| w == "--help" || w == "--version") {
        return true;
    }
    if let Err(e) = command.clone().try_get_matches_from(words) {
        panic!("{place}: {}\n{e}", words.join(" "));
    }
    true
}

/// A line of a shell as words; what follows a comment, a pipe or a redirection is not part of it.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(q), _) if c == q => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ' ' | '\t') => words.extend(word.take()),
            (None, '|' | '>' | ';' | '<' | '&') => break,
            (None, '#') if word.is_none() => break,
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Every command of the programs in the `sh` blocks of a page.
fn commands(page: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let blocks = page.split("```").skip(1).step_by(2).filter(|b| b.starts_with("sh\n"));
    for block in blocks {
        for line in block.replace("\\\n", " ").lines() {
            for part in line.split("&& ").flat_map(|p| p.split("$(")) {
                let words = words(part.trim());
                let is_program = |w: &String| programs().contains_key(w.as_str());
                let Some(at) = words.iter().position(is_program) else { continue };
                // cargo run --bin millrace -- ...
                let rest = words[at + 1..].iter().filter(|w| *w != "--");
                let end = |w: &String| w.trim_end_matches(')').to_owned();
                found.push([&words[at]].into_iter().chain(rest).map(end).collect());
            }
        }
    }
    found
}

#[test]
fn every_command_of_the_pages_parses() {
    for (page, least) in [("README.md", 12), ("deploy/README.md", 15)] {
        let commands = commands(&read(page));
        assert!(commands.len() >= least, "{page} has only {} commands", commands.len());
        commands.iter().for_each(|words| assert!(parses(page, words)));
    }
}

#[test]
fn every_unit_starts_its_program() {
    for name in ["millrace-coordinator", "millrace-node"] {
        let file = format!("deploy/systemd/{name}.service");
        let text = read(&file);
        let start = text.lines().find_map(|l| l.strip_prefix("ExecStart=")).expect("a command");
        let words = words(&start.replace("$MILLRACE_FLAGS", "").replace("${MILLRACE_MODEL}", "m"));
        assert!(parses(&file, &words), "{start}");
        assert!(text.contains("Type=notify") && text.contains("WatchdogSec="));
        known_variables(&file, &text, &["MILLRACE_MODEL", "MILLRACE_FLAGS"]);
    }
}

/// That every variable of ours is one that a program reads.
#[track_caller]
fn known_variables(place: &str, text: &str, own: &[&str]) {
    let names = read("shared/src/names.rs");
    for part in text.split("MILLRACE_").skip(1) {
        let end = part.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(part.len());
        let name = format!("MILLRACE_{}", &part[..end]);
        let twin = programs().values().any(|c| has_twin(c, &name));
        let known = own.contains(&name.as_str()) || names.contains(&format!("\"{name}\"")) || twin;
        assert!(known, "{place}: nothing reads {name}");
    }
}

fn has_twin(command: &Command, name: &str) -> bool {
    command.get_arguments().any(|a| a.get_env().is_some_and(|e| e == name))
        || command.get_subcommands().any(|c| has_twin(c, name))
}

fn texts(list: &Yaml) -> Vec<String> {
    let list = list.as_vec().map(Vec::as_slice).unwrap_or_default();
    list.iter().map(|v| v.as_str().expect("a list of texts").to_owned()).collect()
}

#[test]
fn compose_starts_programs_with_flags_that_exist() {
    let file = "deploy/compose.yaml";
    let text = read(file);
    let document = &yaml(file, &text)[0];
    let services = document["services"].as_hash().expect("services");
    let mut started = 0;
    for (name, service) in services {
        let place = format!("{file}: {name:?}");
        // YAML's merge key, which the parser leaves to its reader.
        let base = &service["<<"]["command"];
        let command = if service["command"].is_badvalue() { base } else { &service["command"] };
        let command = texts(command);
        if service["entrypoint"].is_badvalue() {
            started += usize::from(parses(&place, &command));
        }
        for line in command.iter().flat_map(|part| part.lines()).filter(|l| l.contains(' ')) {
            started += line.split("|| ").map(words).filter(|words| parses(&place, words)).count();
        }
        for mount in texts(&service["volumes"]) {
            let source = mount.split(':').next().expect("a source");
            match source.strip_prefix("./") {
                Some(path) => assert!(root().join("deploy").join(path).exists(), "{mount}"),
                None => assert!(!document["volumes"][source].is_badvalue(), "{mount}"),
            }
        }
    }
    assert_eq!(started, 6, "two of init, the coordinator, three nodes");
    known_variables(file, &text, &["MILLRACE_MODEL", "MILLRACE_GRAFANA_PASSWORD"]);
}

#[test]
fn metrics_of_rules_and_dashboard_exist() {
    let names = read("shared/src/names.rs");
    let known = |name: &str| names.contains(&format!("\"{name}\""));
    let check = |place: &str, expression: &str| {
        let mut found = 0;
        let mut rest = expression;
        while let Some(at) = rest.find("millrace_") {
            rest = &rest[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let (name, after) = rest.split_at(end.unwrap_or(rest.len()));
            let bare = ["_total", "_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix));
            assert!(known(bare.unwrap_or(name)), "{place}: there is no metric {name}");
            (rest, found) = (after, found + 1);
        }
        found
    };
    let file = "deploy/prometheus/alerts.yml";
    let rules = yaml(file, &read(file));
    let rules = rules[0]["groups"][0]["rules"].as_vec().expect("rules").clone();
    let expressions = rules.iter().map(|r| r["expr"].as_str().expect("an expression"));
    assert!(expressions.map(|e| check(file, e)).sum::<i32>() >= 8);

    let file = "deploy/grafana/dashboard.json";
    let board: serde_json::Value = serde_json::from_str(&read(file)).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|p| p["targets"].as_array().into_iter().flatten());
    let expressions = targets.map(|t| t["expr"].as_str().expect("an expression"));
    assert!(expressions.map(|e| check(file, e)).sum::<i32>() >= 40);
    for file in [
        "deploy/prometheus/prometheus.yml",
        "deploy/grafana/provisioning/datasources/prometheus.yaml",
        "deploy/grafana/provisioning/dashboards/millrace.yaml",
    ] {
        yaml(file, &read(file));
    }
}

/// YAML as a template's value.
fn value(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::String(s) => s.clone().into(),
        Yaml::Integer(n) => (*n).into(),
        Yaml::Boolean(b) => (*b).into(),
        Yaml::Array(list) => Value::Array(list.iter().map(value).collect()),
        Yaml::Hash(map) => Value::Map(
            map.iter().map(|(k, v)| (k.as_str().expect("a name").to_owned(), value(v))).collect(),
        ),
        other => panic!("{other:?} in values.yaml"),
    }
}

fn json(value: &Value) -> String {
    match value {
        Value::String(s) => format!("{s:?}"),
        Value::Array(list) => format!("[{}]", list.iter().map(json).collect::<Vec<_>>().join(", ")),
        Value::Map(map) | Value::Object(map) => {
            let pairs: Vec<_> = map.iter().map(|(k, v)| format!("{k:?}: {}", json(v))).collect();
            format!("{{{}}}", pairs.join(", "))
        }
        other => other.to_string(),
    }
}

/// All documents of the chart. The functions that it uses behave as Helm's.
fn chart(change: impl Fn(&mut HashMap<String, Value>)) -> Vec<Yaml> {
    let folder = "deploy/helm/millrace";
    let Value::Map(mut values) = value(&yaml("values", &read(&format!("{folder}/values.yaml")))[0])
    else {
        panic!("values.yaml is no map");
    };
    change(&mut values);
    let map = |pairs: &[(&str, &str)]| {
        Value::Map(pairs.iter().map(|&(k, v)| (k.to_owned(), v.into())).collect())
    };
    let context = Value::Map(HashMap::from([
        ("Values".to_owned(), Value::Map(values)),
        ("Release".to_owned(), map(&[("Name", "demo"), ("Namespace", "ml")])),
        ("Chart".to_owned(), map(&[("AppVersion", "latest")])),
    ]));
    let helpers = read(&format!("{folder}/templates/_helpers.tpl"));
    let mut documents = Vec::new();
    for file in ["coordinator", "node", "network-policy", "disruption", "monitor"] {
        let name = format!("{folder}/templates/{file}.yaml");
        let mut template = Template::default();
        template.add_func("toJson", |a| Ok(json(&a[0]).into()));
        template.add_func("quote", |a| Ok(format!("{:?}", a[0].to_string()).into()));
        template.add_func("default", |a| -> Result<Value, FuncError> {
            let given = a[1].to_string();
            Ok(if given.is_empty() { a[0].clone() } else { a[1].clone() })
        });
        template
            .parse(format!("{helpers}{}", read(&name)))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let context = Context::from(context.clone());
        let text = template.render(&context).unwrap_or_else(|e| panic!("{name}: {e}"));
        documents.extend(yaml(&name, &text).into_iter().filter(|d| !d.is_null()));
    }
    documents
}

fn container(set: &Yaml) -> &Yaml {
    &set["spec"]["template"]["spec"]["containers"][0]
}

#[test]
fn the_chart_renders_and_starts_programs() {
    let with_monitor = |values: &mut HashMap<String, Value>| {
        let Some(Value::Map(monitor)) = values.get_mut("serviceMonitor") else { panic!("values") };
        monitor.insert("enabled".to_owned(), true.into());
    };
    let documents = chart(with_monitor);
    let kinds: Vec<&str> = documents.iter().map(|d| d["kind"].as_str().expect("a kind")).collect();
    for (kind, count) in [
        ("StatefulSet", 2),
        ("Service", 3),
        ("NetworkPolicy", 2),
        ("PodDisruptionBudget", 1),
        ("ServiceMonitor", 1),
    ] {
        assert_eq!(kinds.iter().filter(|k| **k == kind).count(), count, "{kind}");
    }
    let sets: Vec<&Yaml> =
        documents.iter().filter(|d| d["kind"].as_str() == Some("StatefulSet")).collect();
    for set in &sets {
        let words = texts(&container(set)["command"]);
        let words: Vec<String> = words.iter().map(|w| w.replace("$(POD_IP)", "10.0.0.9")).collect();
        assert!(parses("chart", &words));
        let labels = &set["spec"]["template"]["metadata"]["labels"];
        let wanted = set["spec"]["selector"]["matchLabels"].as_hash().expect("labels");
        assert!(wanted.iter().all(|(k, v)| labels[k.as_str().expect("a name")] == *v));
    }
    let coordinator = container(sets[0]);
    let probe =
        |name: &str| coordinator[name]["httpGet"]["path"].as_str().expect("a path").to_owned();
    assert_eq!(
        [probe("livenessProbe"), probe("startupProbe"), probe("readinessProbe")],
        ["/live", "/live", "/ready"]
    );
    let paths = millrace_coordinator::api::http::ENDPOINTS.iter().map(|e| e.path);
    assert_eq!(paths.filter(|p| ["/live", "/ready", "/metrics"].contains(p)).count(), 3);
}

#[test]
fn words_of_a_shell_line() {
    assert_eq!(words("a 'b c' --d=\"e f\" # g"), ["a", "b c", "--d=e f"]);
    assert_eq!(words("a b > c"), ["a", "b"]);
}
