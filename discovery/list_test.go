package discovery

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func TestList(t *testing.T) {
	const want = `10.0.0.1:50051,name=a.example.com,w=3,p=1,l=eu/eu-1/b,map[hash_key:x] 10.0.0.2:50051 ` +
		`10.0.0.2:50052 unix//run/app.sock [::1]:50051`
	for name, c := range map[string]struct {
		yaml bool
		text string
	}{
		"json": {false, `[
			{"address": "10.0.0.1:50051", "name": "a.example.com", "weight": 3, "priority": 1,
				"locality": {"region": "eu", "zone": "eu-1", "sub_zone": "b"}, "metadata": {"hash_key": "x"}},
			{"address": "10.0.0.2:50051-50052"},
			{"address": "unix//run/app.sock"}, {"address": "[::1]:50051"}
		]`},
		"yaml": {true, `# all of them
- address: 10.0.0.1:50051
  name: a.example.com
  weight: 3
  priority: 1
  locality: {region: eu, zone: eu-1, sub_zone: b}
  metadata:
    hash_key: x
- address: 10.0.0.2:50051-50052
- address: unix//run/app.sock
- address: "[::1]:50051"
`},
	} {
		list, err := parseList([]byte(c.text), "origin", c.yaml)
		if err != nil || text(list) != want {
			t.Errorf("%s: got %s, %v; want %s", name, text(list), err, want)
		}
		for _, e := range list {
			if e.Origin != "origin" {
				t.Errorf("%s: %s has origin %q", name, e.Address, e.Origin)
			}
		}
		if list, err := parseList([]byte(" []\n"), "", c.yaml); err != nil || len(list) != 0 {
			t.Errorf("%s: an empty list is %v, %v", name, list, err)
		}
	}
}

func TestListErrors(t *testing.T) {
	for _, c := range []struct {
		yaml       bool
		text, want string
	}{
		{false, "", "empty text; write []"},
		{false, " \n", "empty text; write []"},
		{false, `{"address": "a:1"}`, `line 1: want a list of endpoints`},
		{false, "[\n{\"address\": \"a:1\"},\n{\"address\" \"b:1\"}\n]", "line 3: invalid character '\"' after object key"},
		{false, "[\n{\"address\": \"a:1\"},\n", "line 3: the list breaks off"},
		{false, `[{"address": "a:1"}] x`, "something follows the list"},
		{false, `[{"address": "a:1"}][]`, "something follows the list"},
		{false, "[\n\n{\"host\": \"a:1\"}]", `line 3: entry 1: unknown field "host"`},
		{false, `["a:1"]`, `entry 1: want an object, {"address": "host:port"}, not a string`},
		{false, `[null]`, `entry 1: want an object, {"address": "host:port"}, not null`},
		{false, `[{}]`, "entry 1: address is missing; write host:port"},
		{false, `[{"address": "a"}]`, `entry 1: address: upstream address "a" has no port`},
		{false, `[{"address": "a:0"}]`, "port 0 cannot be dialled"},
		{false, `[{"address": "{env.HOME}:1"}]`, "contains a placeholder"},
		{false, `[{"address": "https://a:1"}]`, "has a scheme; write host:port alone"},
		{false, `[{"address": "a:1", "weight": 0}]`, "weight is 0; write a number from 1 to 65535"},
		{false, `[{"address": "a:1", "weight": -1}]`, "weight is -1"},
		{false, `[{"address": "a:1", "weight": 65536}]`, "weight is 65536"},
		{false, `[{"address": "a:1", "weight": 1.5}]`, "weight: want a whole number, not a number 1.5"},
		{false, `[{"address": "a:1", "weight": "2"}]`, "weight: want a whole number, not a string"},
		{false, `[{"address": "a:1", "weight": 99999999999999999999}]`, "weight: want a whole number"},
		{false, `[{"address": "a:1", "priority": -1}]`, "priority is -1; write a number from 0 to 65535"},
		{false, `[{"address": "a:1", "priority": 65536}]`, "priority is 65536"},
		{false, `[{"address": "a:1", "name": "b:1"}]`, `name "b:1" is not a host name`},
		{false, `[{"address": "a:1", "metadata": {"": "x"}}]`, "metadata has an empty key"},
		{false, `[{"address": "a:1", "metadata": {"x": 1}}]`, "metadata: want a text in quotes, not a number"},
		{false, `[{"address": "a:1", "locality": {"zone": "z", "rack": "r"}}]`, `unknown field "rack"`},
		{false, `[{"address": "a:1", "locality": "eu"}]`, "locality: want an object, not a string"},
		{true, "# nothing\n", "want a list of endpoints"},
		{true, "address: a:1\n", "line 1: want a list of endpoints"},
		{true, "- address: a:1\n- address: [\n", "did not find expected node content"},
		{true, "- address: a:1\n- weight: 1\n", "line 2: entry 2: address is missing"},
		{true, "- address: a:1\n  metadata: {version: 1}\n", "line 1: entry 1: metadata: want a text in quotes, not a number"},
		{true, "- address: a:1\n  1: x\n", "line 1: entry 1:"},
		{true, "- address: a:1\n  address: a:1\n", "already defined at line 1"},
		{true, "- address: a:1\n---\n- address: b:1\n", "something follows the list"},
	} {
		list, err := parseList([]byte(c.text), "", c.yaml)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s\ngot %s, error %v; want %q", c.text, text(list), err, c.want)
		}
	}
}

func TestListLimits(t *testing.T) {
	ranges := func(n int) string {
		var items []string
		for i := range n {
			items = append(items, fmt.Sprintf(`{"address": "h%d:1-4096"}`, i))
		}
		return "[" + strings.Join(items, ",") + "]"
	}
	if list, err := parseList([]byte(ranges(16)), "", false); err != nil || len(list) != maxEndpoints {
		t.Errorf("got %d endpoints, %v; want %d", len(list), err, maxEndpoints)
	}
	if _, err := parseList([]byte(ranges(17)), "", false); err == nil || !strings.Contains(err.Error(), "entry 17: the list has more than 65536 endpoints") {
		t.Errorf("got %v; want too many endpoints", err)
	}
	items := "[" + strings.Repeat("0,", maxEndpoints) + "0]"
	for _, isYAML := range []bool{false, true} {
		if _, err := parseList([]byte(items), "", isYAML); err == nil || !strings.Contains(err.Error(), "more than 65536 entries") {
			t.Errorf("YAML %v: got %v; want too many entries", isYAML, err)
		}
	}
	// Aliases within aliases.
	bomb := "- &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'j'; c++ {
		bomb += fmt.Sprintf("- &%c [%s]\n", c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c,", c-1), 9), ","))
	}
	if _, err := parseList([]byte(bomb), "", true); err == nil {
		t.Error("a list that explodes is accepted")
	}
}

// FuzzList: no text makes the parsers panic, and what they accept is in range.
func FuzzList(f *testing.F) {
	for _, s := range []string{
		`[{"address": "a:1", "weight": 3, "metadata": {"a": "b"}}]`, "- address: a:1-3\n  locality: {zone: z}\n", "[", "[]", "- &a [*a]",
		`[{"address": "unix//x", "priority": 4294967296}]`, "- !!binary x", "? - a\n: b", "\xff\xfe", "- address: a:1\n---\n",
	} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	f.Fuzz(func(t *testing.T, raw []byte, isYAML bool) {
		list, err := parseList(raw, "origin", isYAML)
		if err != nil {
			if list != nil || err.Error() == "" {
				t.Errorf("got %v with error %q", list, err)
			}
			return
		}
		for _, e := range list {
			if e.Address == "" || e.Network != "tcp" && e.Network != "unix" || e.Weight > upstream.MaxWeight || e.Priority > maxPriority || e.Origin != "origin" {
				t.Errorf("got %+v", e)
			}
		}
	})
}
