//! Layers that an operator pins to nodes, from flags to what the planner reckons with.
//!
//! A pin binds as long as its node is there: a plan without that node is made as if there were no
//! such pin, and says so. Nothing here decides what becomes of the other layers.

use millrace_shared::options::Pin;
use millrace_shared::partition::NodeCosts;

use super::{Deployment, PlanNode};

/// What can be said of pins before any node is there.
///
/// # Errors
/// Names the flags that contradict each other, or the model.
pub fn check(pins: &[Pin], layers: u32, deployment: &Deployment) -> Result<(), String> {
    if let (Some(pin), Some(_)) = (pins.first(), &deployment.cuts) {
        return Err(format!(
            "--pin {pin} and --cuts cannot be had together: --cuts says where all layers are"
        ));
    }
    for (i, pin) in pins.iter().enumerate() {
        if pin.layers.end > layers {
            return Err(format!("--pin {pin}: the model has layers 0-{}", layers - 1));
        }
        for other in &pins[..i] {
            if other.node == pin.node {
                return Err(format!(
                    "--pin {other} and --pin {pin}: a node has layers that follow each other, pin \
                     '{}' once",
                    pin.node
                ));
            }
            let from = other.layers.first.max(pin.layers.first);
            if from < other.layers.end.min(pin.layers.end) {
                return Err(format!(
                    "--pin {other} and --pin {pin} both take layer {from}: a layer has one node"
                ));
            }
        }
    }
    Ok(())
}

/// Pins nodes; `is` says whether a node is the one that a pin names. Of several the first is.
pub fn bind(pins: &[Pin], nodes: &mut [NodeCosts], is: impl Fn(usize, &Pin) -> bool) {
    for pin in pins {
        if let Some(node) = (0..nodes.len()).find(|&n| is(n, pin)) {
            nodes[node].pin = Some(pin.layers);
        }
    }
}

/// Whether a pin names this node.
pub fn names(pin: &Pin, node: &PlanNode) -> bool {
    pin.node == node.hello.name || pin.node == node.id.to_string()
}

/// What an operator should know of pins that bind none of these nodes, or could bind several.
pub fn remarks(pins: &[Pin], nodes: &[PlanNode]) -> Vec<String> {
    let remark = |pin: &Pin| match nodes.iter().filter(|n| names(pin, n)).count() {
        0 => Some(format!(
            "--pin {pin} binds nothing: '{}' is not among the nodes of this plan; its layers go to \
             others until it is there and the model is cut anew",
            pin.node
        )),
        1 => None,
        n => Some(format!(
            "--pin {pin}: {n} nodes are called '{}', the first is taken; pin by id",
            pin.node
        )),
    };
    pins.iter().filter_map(remark).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{LimitArgs, deployment};
    use millrace_shared::options::EngineOptions;

    #[test]
    fn pins_that_contradict_are_named() {
        let pins = |all: &[&str]| -> Vec<Pin> { all.iter().map(|p| p.parse().unwrap()).collect() };
        let mut given = deployment(&EngineOptions::default(), &LimitArgs::default());
        assert_eq!(check(&pins(&["a=0-9", "b=10-29"]), 30, &given), Ok(()));
        let wrong = |all: &[&str]| check(&pins(all), 30, &given).unwrap_err();
        assert!(wrong(&["a=20-30"]).contains("--pin a=20-30: the model has layers 0-29"));
        assert!(wrong(&["a=0-9", "b=9-12"]).contains("both take layer 9"));
        assert!(wrong(&["a=0-9", "a=12-13"]).contains("pin 'a' once"));
        given.cuts = Some(vec![3]);
        assert!(check(&pins(&["a=1"]), 30, &given).unwrap_err().contains("--cuts"));
    }
}
