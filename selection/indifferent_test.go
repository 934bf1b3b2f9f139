package selection

import "testing"

func TestIndifferent(t *testing.T) {
	for name, tc := range map[string]struct {
		policy Policy
		want   bool
	}{
		"round_robin":            {new(RoundRobin), true},
		"priorities of it":       {WithPriorities(new(LeastRequest)), true},
		"first":                  {new(First), false},
		"a hash":                 {new(RingHash), false},
		"priorities of a hash":   {WithPriorities(new(Maglev)), false},
		"sticky":                 {new(Sticky), false},
		"subsets":                {new(Subset), false},
		"localities":             {new(Locality), false},
		"somebody else's policy": {other{}, false},
	} {
		if got := Indifferent(tc.policy); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

type other struct{ Policy }
